"""Masks: which files are some, whose, and what they say."""

from pathlib import Path

import numpy as np
import pytest
from pictures import HEIGHT, WIDTH, difference, picture
from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos.masks import masked_stem
from svfit_dreambooth.photos.reading import find_photos, open_mask, photo_report


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


@pytest.mark.parametrize(
    "name",
    ["a.mask.png", "a_mask.png", "a-mask.jpg", "a-masklabel.png", "a.MASK.PNG", "A_Mask.png", "a.jpg.mask.png"],
)
def test_other_programs_names_for_masks(tmp_path, name):
    picture().save(tmp_path / "a.jpg")
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (10, 5, 30, 20))
    mask.save(tmp_path / name)
    (photo,) = find_photos(tmp_path)
    assert photo.path.name == "a.jpg" and photo.mask == tmp_path / name
    assert difference(open_mask(photo), mask) < 30


@pytest.mark.parametrize("name", ["mask.png", "masked ball.jpg", "unmasked.png", "a.mask.txt", "gasmask.jpg"])
def test_names_that_are_no_masks(name):
    assert masked_stem(Path(name)) is None


def test_a_mask_without_its_photo_is_never_trained_on(tmp_path, caplog):
    picture().save(tmp_path / "a.jpg")
    picture(seed=1).save(tmp_path / "venetian_mask.jpg")
    assert [photo.path.name for photo in find_photos(tmp_path)] == ["a.jpg"]
    assert "'venetian_mask.jpg' is the mask of no photo" in caplog.text


def test_of_several_masks_one_is_named_as_used(tmp_path, caplog):
    picture().save(tmp_path / "a.jpg")
    for name in ("a.mask.png", "a_mask.png"):
        Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / name)
    assert find_photos(tmp_path)[0].mask == tmp_path / "a.mask.png"
    assert "a.mask.png is used, not a_mask.png" in caplog.text
