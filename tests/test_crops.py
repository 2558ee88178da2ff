"""Windows of photos: their shape and place, their mirror images and masks, and what SDXL is told of them."""

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos.crops import crop_boxes, crop_photo, training_size

SQUARE = (16, 16)


def examples(image, resolution, **options):
    return crop_photo(image, (resolution, resolution), **options).pixel_values


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("photo", "size"),
    [
        ((3024, 4032), (448, 576)),  # a phone, upright
        ((4032, 3024), (576, 448)),
        ((4000, 6000), (384, 576)),  # a camera
        ((1080, 1920), (384, 640)),  # a film
        ((1000, 1000), (512, 512)),
        ((1000, 950), (512, 512)),
        ((9000, 1000), (640, 320)),  # a panorama is cropped
    ],
)
def test_training_size(photo, size):
    assert training_size(photo, 512, 64) == size


def test_no_photo_costs_more_than_a_square_one_or_loses_its_head():
    for width in range(300, 601, 7):
        own = training_size((width, 600), 512, 64)
        kept = min(own[0] / own[1] / (width / 600), width / 600 / (own[0] / own[1]))
        assert own[0] * own[1] <= 512**2 and all(side % 64 == 0 for side in own) and kept > 0.85
    assert training_size((30, 30), 100, 64) == (100, 100)  # the resolution itself need be no multiple


def test_windows_of_other_shapes():
    assert crop_boxes((600, 800), (448, 576), True, 3, seed=0) == [(0, 14, 600, 785)]
    boxes = crop_boxes((600, 1000), (448, 576), False, 20, seed=0)
    assert all((left, right, bottom - top) == (0, 600, 771) and 0 <= top <= 229 for left, top, right, bottom in boxes)
    assert len(set(boxes)) > 10
    values = crop_photo(picture(60, 99), (12, 16), crops=2, random_flip=True)
    assert values.pixel_values.shape == (4, 3, 16, 12) and values.mask is None


# ---------------------------------------------------------------- masks and time ids


def test_masks_follow_their_window():
    image, mask = picture(90, 60), Image.new("L", (90, 60))
    mask.paste(255, (50, 0, 90, 60))
    found = crop_photo(image, (20, 20), mask, crops=6, random_flip=True, seed=4)
    assert found.mask.shape == (12, 1, 20, 20) and found.mask.min() == 0 and found.mask.max() == 1
    assert torch.equal(found.mask[1::2], found.mask[0::2].flip(-1))
    red = found.pixel_values[0::2, 0]  # grows to the right of the photo: 200 / 255 at its end
    inside = found.mask[0::2, 0] == 1
    edge = 50 / 90 * 200 / 127.5 - 1
    assert red[inside].min() > edge - 0.06 and red[~inside].max() < edge + 0.06


def test_time_ids_say_where_the_window_was():
    found = crop_photo(picture(400, 200), (50, 50), center_crop=True, random_flip=True)
    assert found.time_ids.tolist() == [[200, 400, 0, 25, 50, 50]] * 2
    found = crop_photo(picture(400, 200), (50, 50), random_flip=True, seed=2)
    (_, _, top, left, *_), (_, _, _, mirrored, *_) = found.time_ids.tolist()
    assert top == 0 and left + mirrored == 50 and left != mirrored  # the photo is 100 wide when 50 high


# ---------------------------------------------------------------- windows


def test_centre_crop():
    assert crop_boxes((100, 60), SQUARE, True, 5, seed=3) == [(20, 0, 80, 60)]
    assert crop_boxes((60, 101), SQUARE, True, 1, seed=3) == [(0, 20, 60, 80)]
    assert crop_boxes((60, 60), SQUARE, True, 1, seed=3) == [(0, 0, 60, 60)]


def test_random_crops_are_fixed_by_the_seed():
    boxes = crop_boxes((1000, 60), SQUARE, False, 50, seed=7)
    assert (
        boxes == crop_boxes((1000, 60), SQUARE, False, 50, seed=7) != crop_boxes((1000, 60), SQUARE, False, 50, seed=8)
    )
    assert boxes[:3] == crop_boxes((1000, 60), SQUARE, False, 3, seed=7)
    assert len(set(boxes)) > 40
    assert all(r - left == b - t == 60 and left >= 0 and r <= 1000 and t == 0 for left, t, r, b in boxes)
    assert crop_boxes((60, 60), SQUARE, False, 2, seed=-1) == [(0, 0, 60, 60)] * 2


@pytest.mark.parametrize(("crops", "flip", "variants"), [(1, False, 1), (3, False, 3), (3, True, 6)])
def test_examples_shape_and_range(crops, flip, variants):
    values = examples(picture(), 16, random_flip=flip, crops=crops, seed=1)
    assert values.shape == (variants, 3, 16, 16) and values.dtype == torch.float32
    assert values.min() >= -1 and values.max() <= 1


def test_black_and_white_reach_the_ends():
    assert torch.all(examples(Image.new("RGB", (9, 9), "black"), 4) == -1)
    assert torch.all(examples(Image.new("RGB", (9, 9), "white"), 4) == 1)


def test_flips_follow_their_crop_as_mirror_images():
    plain = examples(picture(), 16, crops=3, seed=1)
    flipped = examples(picture(), 16, random_flip=True, crops=3, seed=1)
    assert torch.equal(flipped[0::2], plain)
    assert torch.equal(flipped[1::2], plain.flip(-1))


def test_examples_depend_on_seed_and_name_only():
    wide = picture(400, 20)
    first = examples(wide, 8, seed=1, index="a.jpg")
    assert torch.equal(first, examples(wide, 8, seed=1, index="a.jpg"))
    assert not torch.equal(first, examples(wide, 8, seed=2, index="a.jpg"))
    assert not torch.equal(first, examples(wide, 8, seed=1, index="b.jpg"))
    centred = [examples(wide, 8, center_crop=True, crops=4, seed=s) for s in (1, 2)]
    assert torch.equal(*centred) and len(centred[0]) == 1


def test_centre_crop_agrees_with_resizing_first():
    """The window taken from the original is the one that diffusers takes from the resized photo."""
    ours = examples(picture(96, 64), 32, center_crop=True)[0]
    resized = picture(96, 64).resize((48, 32), Image.Resampling.LANCZOS).crop((8, 0, 40, 32))
    reference = torch.from_numpy(np.asarray(resized).astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
    inner = (slice(None), slice(4, -4), slice(4, -4))  # LANCZOS looks over the edge of a window, not of a photo
    assert (ours - reference)[inner].abs().max() < 2.5 / 127.5


def test_small_photos_are_enlarged():
    assert examples(picture(5, 3), 64).shape == (1, 3, 64, 64)


def test_impossible_requests():
    with pytest.raises(SVFitError, match="resolution 0x0"):
        examples(picture(), 0)
    with pytest.raises(SVFitError, match="0 crops"):
        examples(picture(), 8, crops=0)
