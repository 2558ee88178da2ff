"""Photos: what opens, how it looks upright and opaque, what is skipped and what is refused."""

import io
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos.reading import find_photos, open_mask, open_photo, photo_report

WIDTH, HEIGHT = 48, 32


def picture(width=WIDTH, height=HEIGHT, seed=0):
    """Smooth, without any symmetry: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 30 + seed)], axis=-1).astype(np.uint8))


def jpeg_bytes(image=None, **options):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def difference(a, b):
    return np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max()


# ---------------------------------------------------------------- opening


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif", "a.tiff", "no_suffix"])
def test_formats(tmp_path, name):
    kind = {"no_suffix": "PNG"}.get(name)
    picture().save(tmp_path / name, kind)
    (photo,) = find_photos(tmp_path)
    assert photo.path.name == name and photo.size == (WIDTH, HEIGHT) and photo.caption is None
    assert difference(open_photo(photo.path), picture()) < 40


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    stored = {  # what the camera stores so that the tag's rule gives back the upright picture
        1: lambda p: p,
        2: lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda p: p.transpose(Image.Transpose.ROTATE_180),
        4: lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda p: p.transpose(Image.Transpose.TRANSPOSE),
        6: lambda p: p.transpose(Image.Transpose.ROTATE_90),
        7: lambda p: p.transpose(Image.Transpose.TRANSVERSE),
        8: lambda p: p.transpose(Image.Transpose.ROTATE_270),
    }[orientation](picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif)
    assert difference(open_photo(path), picture()) < 24
    assert find_photos(tmp_path)[0].size == (WIDTH, HEIGHT)


def test_broken_exif_keeps_the_photo(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_bytes(exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff garbage"))
    assert open_photo(path).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((10, 20, 30, 0), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png")
    opened = open_photo(tmp_path / "a.png")
    assert opened.mode == "RGB" and opened.getpixel((1, 1)) == (255, 255, 255) and opened.getpixel((6, 6))[0] < 255


def test_half_transparent(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert open_photo(tmp_path / "a.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize(("mode", "name"), [("L", "a.png"), ("1", "a.png"), ("P", "a.png"), ("CMYK", "a.jpg")])
def test_modes_become_rgb(tmp_path, mode, name):
    picture().convert(mode).save(tmp_path / name)
    opened = open_photo(tmp_path / name)
    assert opened.mode == "RGB" and opened.size == (WIDTH, HEIGHT)
    if mode == "CMYK":
        assert difference(opened, picture()) < 24


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / f"a.{suffix}")
    opened = np.asarray(open_photo(tmp_path / f"a.{suffix}"))
    assert np.array_equal(opened[..., 0], np.round(ramp / 257).astype(np.uint8))


def test_float_tiff(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tiff")
    assert np.asarray(open_photo(tmp_path / "a.tiff")).max() == 255


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animated_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **options)
    assert getattr(Image.open(tmp_path / f"a.{suffix}"), "n_frames", 1) == 3
    assert open_photo(find_photos(tmp_path)[0].path).getpixel((8, 8)) == (255, 0, 0)


def test_phone_pictures_of_several_views(tmp_path):
    views = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    views[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=views[1:])
    assert open_photo(find_photos(tmp_path)[0].path).getpixel((8, 8)) == (255, 255, 255)


def test_decompression_bomb(tmp_path, monkeypatch, caplog):
    picture().save(tmp_path / "bomb.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "ok.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(SVFitError, match="more than 1000 pixels"):
        open_photo(tmp_path / "bomb.png")
    assert [photo.path.name for photo in find_photos(tmp_path)] == ["ok.png"]
    assert "bomb.png" in caplog.text


def test_large_but_safe_is_silent(tmp_path, monkeypatch, recwarn):
    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    open_photo(tmp_path / "a.png")
    assert not recwarn.list


def test_postscript_is_not_handed_to_ghostscript(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(SVFitError, match="isn't a picture"):
        open_photo(tmp_path / "a.png")


# ---------------------------------------------------------------- folders


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


def test_captions(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        picture(seed=ord(name[0])).save(tmp_path / name)
    (tmp_path / "a.txt").write_bytes("\ufeffa photo of a süßes dog \n".encode())
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "c.txt").write_text("plain")
    assert [photo.caption for photo in find_photos(tmp_path)] == ["a photo of a süßes dog", None, "plain", None]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(SVFitError, match=r"c\.txt.*UTF-8"):
        find_photos(tmp_path)


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


# ---------------------------------------------------------------- masks


def test_a_file_beside_the_photo_is_its_mask(tmp_path):
    picture().save(tmp_path / "a.jpg")
    picture(seed=1).save(tmp_path / "b.jpg")
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (10, 5, 30, 20))
    mask.save(tmp_path / "a.mask.png")
    first, second = find_photos(tmp_path)
    assert first.mask == tmp_path / "a.mask.png" and second.mask is None and open_mask(second) is None
    assert difference(open_mask(first), mask) == 0
    assert "masks: 1 of 2" in photo_report([first, second], 16)
    mask.resize((WIDTH * 2, HEIGHT * 2)).save(tmp_path / "a.mask.png")  # of another size, but the same proportions
    assert open_mask(first).size == (WIDTH, HEIGHT) and difference(open_mask(first), mask) < 140


def test_an_alpha_channel_is_a_mask_unless_opaque_or_overruled(tmp_path):
    image = picture().convert("RGBA")
    image.save(tmp_path / "a.png")
    assert find_photos(tmp_path)[0].mask is None
    image.paste((0, 0, 0, 0), (0, 0, 10, HEIGHT))
    image.save(tmp_path / "a.png")
    (photo,) = find_photos(tmp_path)
    mask = np.asarray(open_mask(photo))
    assert photo.mask == photo.path and not mask[:, :10].any() and (mask[:, 10:] == 255).all()
    Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / "a.mask.png")
    (photo,) = find_photos(tmp_path)
    assert np.asarray(open_mask(photo)).min() == 255


def test_white_on_transparent_is_a_mask_too(tmp_path):
    picture().save(tmp_path / "a.jpg")
    mask = Image.new("RGBA", (WIDTH, HEIGHT), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 8))
    mask.save(tmp_path / "a.mask.png")
    values = np.asarray(open_mask(find_photos(tmp_path)[0]))
    assert (values[:8, :8] == 255).all() and values.sum() == 64 * 255


def test_masks_turn_with_their_photo(tmp_path):
    """The mask is drawn on the upright photo; a mask in the photo's own alpha channel turns with it."""
    image = picture(HEIGHT, WIDTH).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, HEIGHT, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    (photo,) = find_photos(tmp_path)
    mask = np.asarray(open_mask(photo))
    assert photo.size == (WIDTH, HEIGHT) == mask.shape[::-1] and not mask[:, -10:].any() and mask[:, :-10].all()


def test_masks_that_cannot_be_meant(tmp_path, caplog):
    picture().save(tmp_path / "a.jpg")
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "a.mask.png")
    with pytest.raises(SVFitError, match=r"a\.mask\.png' is empty"):
        find_photos(tmp_path)
    Image.new("L", (HEIGHT, WIDTH), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(SVFitError, match="32x48 pixels and its photo 48x32"):
        find_photos(tmp_path)
    (tmp_path / "a.mask.png").rename(tmp_path / "c.mask.png")
    assert [photo.path.name for photo in find_photos(tmp_path)] == ["a.jpg"]
    assert "'c.mask.png' is the mask of no photo" in caplog.text


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


def test_a_photo_as_phones_take_it_is_named(tmp_path):
    (tmp_path / "IMG 1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500))
    with pytest.raises(SVFitError, match="is a HEIC picture, which can't be read here: save it as JPEG"):
        open_photo(tmp_path / "IMG 1.HEIC")
    with pytest.raises(SVFitError, match="holds 1 entry, but no usable photo"):
        find_photos(tmp_path)
