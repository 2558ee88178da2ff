"""Colour profiles: what is converted, and what is refused in words."""

import numpy as np
import pytest
from pictures import as_srgb, difference, display_p3, picture
from PIL import Image, ImageCms

from svfit_dreambooth.photos.profiles import to_srgb

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_srgb_stays_to_the_bit():
    everything = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert difference(to_srgb(everything, SRGB)[0], everything) == 0
    assert difference(to_srgb(everything, None)[0], everything) == 0


def test_display_p3_by_its_published_matrix():
    converted, unread = to_srgb(picture(), display_p3())
    assert not unread and converted.mode == "RGB"
    assert difference(converted, as_srgb(picture())) <= 2 and difference(converted, picture()) > 10


def test_grey_and_palette_pictures_take_a_profile_of_rgb():
    grey = Image.linear_gradient("L")
    converted, unread = to_srgb(grey, display_p3())
    assert not unread and difference(converted, grey.convert("RGB")) <= 1  # both have one white and one curve
    palette = picture().quantize(64)
    assert difference(to_srgb(palette, display_p3())[0], as_srgb(palette.convert("RGB"))) <= 2


def test_lab_needs_no_profile():
    lab = ImageCms.profileToProfile(
        picture(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    errors = np.abs(np.asarray(to_srgb(lab, None)[0], dtype=float) - np.asarray(picture(), dtype=float))
    assert errors.mean() < 1.5  # eight bits of LAB are coarse where colours are dark and full


@pytest.mark.parametrize(
    ("image", "profile", "said"),
    [
        (picture(), b"this is no profile", "can't be read"),
        (picture().convert("CMYK"), SRGB, "is for RGB values"),
    ],
)
def test_profiles_that_do_not_fit_are_left_out_in_words(image, profile, said):
    converted, unread = to_srgb(image, profile)
    assert said in unread and difference(converted, image.convert("RGB")) == 0
