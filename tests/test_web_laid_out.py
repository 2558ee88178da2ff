"""The photos that a visitor lays out for training: looked at, turned, masked, told apart."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svfit_dreambooth.photos.reading import find_photos, open_mask, open_photo
from svfit_dreambooth.web.rooms.laid_out import (
    add_photos,
    photo_files,
    photo_remarks,
    remove_photo,
    rotate_photo,
    thumbnail,
)
from svfit_dreambooth.web.rooms.workspace import Workspace


@pytest.fixture
def visitor(tmp_path):
    return Workspace(tmp_path / "home").visitor("0" * 32)


def test_uploaded_photos_are_looked_at(visitor, tmp_path, photo_folder):
    good = [shutil.copy(path, tmp_path) for path in sorted(photo_folder.glob("*.png"))]
    script = tmp_path / "photo.png"
    script.write_text("<script>alert(1)</script>")
    cut = tmp_path / "cut.png"
    cut.write_bytes((photo_folder / "photo 0.png").read_bytes()[:200])
    remarks = add_photos(visitor.photos, [*map(Path, good), script, cut])
    assert [path.name for path in photo_files(visitor.photos)] == ["001.png", "002.png", "003.png"]
    assert len(remarks) == 2 and "isn't a picture" in remarks[0] and "broken or cut short" in remarks[1]
    assert not any(str(tmp_path) in remark for remark in remarks)
    before = np.asarray(Image.open(visitor.photos / "001.png"))
    rotate_photo(visitor.photos / "001.png")
    assert np.array_equal(np.asarray(Image.open(visitor.photos / "001.png")), np.rot90(before, -1))


def test_thumbnails_are_small_and_follow_their_photos(visitor, tmp_path):
    gradient = Image.fromarray(np.stack([np.arange(1200).repeat(900).reshape(1200, 900) // 5] * 3, -1).astype(np.uint8))
    gradient.save(tmp_path / "photo.png")
    add_photos(visitor.photos, [tmp_path / "photo.png"])
    (photo,) = photo_files(visitor.photos)
    before = Image.open(thumbnail(photo))
    assert before.size == (192, 256)
    rotate_photo(photo)
    after = Image.open(thumbnail(photo))
    assert np.abs(np.asarray(after, int) - np.rot90(np.asarray(before, int), -1)).max() <= 3
    remove_photo(photo)
    assert list(visitor.photos.iterdir()) == []


def test_photos_lose_their_notes_and_alike_ones_are_told(visitor, tmp_path):
    gradient = np.add.outer(np.arange(90), np.arange(120)).astype(np.uint8)
    photo = Image.fromarray(np.stack([gradient] * 3, -1))
    exif = Image.Exif()
    exif[0x0110] = "a camera"
    exif[0x0112] = 6  # to be turned
    photo.save(tmp_path / "a.jpg", exif=exif)
    photo.rotate(-90, expand=True).resize((45, 60)).save(tmp_path / "b.png")
    add_photos(visitor.photos, [tmp_path / "a.jpg", tmp_path / "b.png"])
    first = Image.open(visitor.photos / "001.png")
    assert first.size == (90, 120) and not first.getexif() and "exif" not in first.info
    remarks = photo_remarks(visitor.photos, 64)
    assert "photo 2 looks like photo 1: remove one, it would count twice" in remarks
    assert any("few photos" in line for line in remarks)
    assert any("photo 2 (45x60)" in line for line in remarks)


def test_what_is_transparent_stays_the_mask_and_masks_apart_are_refused(visitor, tmp_path):
    photo = Image.effect_noise((60, 40), 80).convert("RGB")
    photo.putalpha(Image.radial_gradient("L").resize((60, 40)))
    photo.save(tmp_path / "dog.png")
    photo.getchannel("A").save(tmp_path / "dog.mask.png")
    Image.new("RGBA", (60, 40)).save(tmp_path / "nothing.png")
    said = add_photos(visitor.photos, [tmp_path / name for name in ("dog.png", "dog.mask.png", "nothing.png")])
    assert len(said) == 2 and "dog.mask.png is a mask" in said[0] and "'nothing.png' is empty" in said[1]
    (kept,) = find_photos(visitor.photos)
    assert open_photo(kept.path).tobytes() == open_photo(tmp_path / "dog.png").tobytes()
    assert open_mask(kept).tobytes() == photo.getchannel("A").tobytes()
    rotate_photo(kept.path)
    (turned,) = find_photos(visitor.photos)
    assert open_mask(turned).tobytes() == photo.getchannel("A").transpose(Image.Transpose.ROTATE_270).tobytes()
    assert "masks: 1 of 1" in photo_remarks(visitor.photos, 32) and Image.open(thumbnail(turned.path)).mode == "RGBA"
