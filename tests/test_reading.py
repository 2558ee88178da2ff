"""A folder of photos: what is found, skipped, refused, and what is said of it."""

import io
import logging
import os
import shutil

import pytest
from pictures import jpeg_bytes, picture

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos.crops import crop_photo
from svfit_dreambooth.photos.reading import find_photos, open_photo, photo_report

BROKEN = {
    "cut.jpg": jpeg_bytes()[:400],
    "empty.png": b"",
    "text.jpg": b"this is no picture",
    "head_only.jpg": b"\xff\xd8\xff\xe0",
    "cut.gif": b"GIF89a",
    "movie.mp4": b"\0\0\0 ftypisom",
}


def damaged_png():
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(("name", "content"), [*BROKEN.items(), ("flipped.png", damaged_png())])
def test_broken_files_are_named_and_skipped(tmp_path, caplog, name, content):
    (tmp_path / name).write_bytes(content)
    picture().save(tmp_path / "good.png")
    assert [photo.path.name for photo in find_photos(tmp_path)] == ["good.png"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "svfit_dreambooth" and name in record.message


def test_sorted_by_name_with_unicode_and_spaces(tmp_path):
    names = ["ein Photo.jpg", "zebra.jpg", "ärger.png", "写真 1.webp", "B.JPG"]
    for i, name in enumerate(names):
        picture(seed=i).save(tmp_path / name)
    assert [photo.path.name for photo in find_photos(str(tmp_path))] == sorted(names)


def test_quiet_hidden_and_subfolders(tmp_path, caplog):
    picture().save(tmp_path / "a.png")
    picture(seed=9).save(tmp_path / ".hidden.png")
    for name in ("a.txt", "metadata.json", "Thumbs.db", "notes.md"):
        (tmp_path / name).write_text("a caption")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "x.txt").write_text("x")
    assert len(find_photos(tmp_path)) == 1 and not caplog.records
    (tmp_path / "more").mkdir()
    picture(seed=1).save(tmp_path / "more" / "b.png")
    assert len(find_photos(tmp_path)) == 1
    (record,) = caplog.records
    assert "more" in record.message and "plain" not in record.message


def test_copies_are_pointed_out(tmp_path, caplog):
    picture().save(tmp_path / "a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "b.png")
    assert len(find_photos(tmp_path)) == 2
    assert "'b.png' is a copy of 'a.png'" in caplog.text


def test_refusals_are_one_sentence(tmp_path):
    with pytest.raises(SVFitError, match="no folder.*nowhere"):
        find_photos(tmp_path / "nowhere")
    with pytest.raises(SVFitError, match="holds nothing"):
        find_photos(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(SVFitError, match="is a file"):
        find_photos(tmp_path / "a.txt")
    with pytest.raises(SVFitError, match="no usable photo"):
        find_photos(tmp_path)
    (tmp_path / "dogs").mkdir()
    picture().save(tmp_path / "dogs" / "a.png")
    with pytest.raises(SVFitError, match=r"sub-folders \(dogs\)"):
        find_photos(tmp_path)
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(SVFitError, match="no usable photo"):
        find_photos(tmp_path)
    with pytest.raises(SVFitError, match="isn't a file"):
        open_photo(tmp_path / "gone.jpg")


# ---------------------------------------------------------------- report


def test_report(tmp_path):
    picture(40, 30).save(tmp_path / "small.png")
    picture(200, 100).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("wide")
    report = "\n".join(photo_report(find_photos(tmp_path), 64))
    assert "2 photos, 40x30 to 200x100 pixels" in report
    assert "resolution of 64" in report and "small.png (40x30)" in report and "wide.png" not in report
    assert "few photos" in report and "captions: 1 of 2" in report
    assert photo_report(find_photos(tmp_path)[1:] * 3, 64) == [
        "3 photos, 200x100 pixels",
        "captions: 3 of 3",
    ]


def test_names_in_another_encoding_are_photos_like_others(tmp_path):
    name = os.fsdecode(b"h\xfcnd.png")
    try:
        picture(20, 10).save(tmp_path / name, "PNG")
    except OSError:
        pytest.skip("this file system takes no such name")
    (photo,) = find_photos(tmp_path)
    assert photo.path.name == name and name in "\n".join(photo_report([photo], 64))
    assert len(crop_photo(open_photo(photo.path), (8, 8), crops=3, index=name).pixel_values) > 1
