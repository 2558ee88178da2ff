"""Painting that begins with a picture."""

import json
import math

import flow_bases
import numpy as np
import pytest
from PIL import Image, ImageOps

from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.from_picture import Begin
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.painting.loading import load_adapter

STEPS = {"num_inference_steps": 5}


@pytest.fixture(scope="module")
def photo():
    rows = np.linspace(0, 255, 40)[:, None, None] * np.ones((1, 80, 3))
    return Image.fromarray(rows.astype(np.uint8))


def pixels(picture):
    return np.asarray(picture.image, dtype=int)


def test_the_picture_counts_its_shape_is_kept_and_little_strength_makes_few_steps(tiny_base, dog_adapter, photo):
    model, steps = open_base_model(str(tiny_base)), []

    def paint(image, strength, **options):
        steps.clear()
        begin = Begin(image, strength)
        return generate(model, ["a dog"], begin=begin, on_denoising_step=lambda *step: steps.append(step), **STEPS)[0]

    weak = paint(photo, 0.2)
    assert steps == [(1, 1)] and weak.image.size == (24, 8)  # the picture's shape, the base's size
    assert (weak.settings["strength"], weak.settings["masked"], weak.settings["width"]) == (0.2, False, 24)
    assert np.array_equal(pixels(weak), pixels(paint(photo, 0.2)))
    assert np.any(pixels(weak) != pixels(paint(ImageOps.mirror(photo.rotate(180)), 0.2)))
    strong = paint(photo, 1.0)
    assert steps[-1] == (5, 5)
    load_adapter(model.pipeline, dog_adapter)
    adapted = paint(photo, 1.0)
    assert np.any(pixels(adapted) != pixels(strong)) and adapted.settings["adapters"] == {"dog": 1.0}


def test_with_a_mask_only_what_is_white_is_painted_anew(tiny_base, photo):
    model = open_base_model(str(tiny_base))

    def paint(prompt, mask):
        (picture,) = generate(model, [prompt], begin=Begin(photo, 1.0, mask), width=32, height=16, **STEPS)
        assert picture.settings["masked"]
        return pixels(picture)

    black, half = Image.new("L", photo.size), Image.new("L", photo.size)
    half.paste(255, (0, 0, 40, 40))
    assert np.array_equal(paint("a dog", black), paint("a mug on the beach", black))
    assert np.any(paint("a dog", half) != paint("a mug on the beach", half))


@pytest.mark.parametrize("make", ["tiny_flux1", "tiny_sd3", "tiny_z_image", "tiny_qwen_image", "tiny_klein"])
def test_flow_bases_begin_with_a_picture_where_diffusers_can(make, tmp_path, photo):
    getattr(flow_bases, make)().save_pretrained(tmp_path)
    model, whole = open_base_model(str(tmp_path)), Image.new("L", photo.size, 255)

    def paint(image, mask=None):
        begin = Begin(image, 0.5, mask)
        return pixels(generate(model, ["a dog"], begin=begin, num_inference_steps=2, width=32, height=32)[0])

    if make == "tiny_klein":  # it looks at pictures, and paints from noise all the same
        with pytest.raises(SVFitError, match="diffusers has no pipeline that begins with a picture for a Flux2Klein"):
            paint(photo)
        return
    other = photo.rotate(180)
    assert np.any(paint(photo) != paint(other))
    if make != "tiny_sd3":  # whose pipeline with masks wants the channels of the real one
        assert np.any(paint(photo, whole) != paint(other, whole))


@pytest.mark.parametrize("strength", [0, -1, 1.5, math.nan])
def test_strengths_that_mean_nothing_are_refused(photo, strength):
    with pytest.raises(SVFitError, match=f"the strength is {strength}: give more than 0"):
        Begin(photo, strength)


def test_on_the_command_line(tiny_base, photo, tmp_path, capsys):
    photo.save(tmp_path / "photo.png")
    paint = ["generate", "--pretrained_model_name_or_path", str(tiny_base), "--prompt", "a dog", "--num_images", "1"]
    paint += ["--num_inference_steps", "4", "--output_dir", str(tmp_path / "out")]
    assert main([*paint, "--image", str(tmp_path / "photo.png"), "--strength", "0.5", "--scheduler", "euler"]) == 0
    with Image.open(next((tmp_path / "out").glob("*.png"))) as picture:
        settings = json.loads(picture.text["svfit"])
        assert "Sampler: euler, " in picture.text["parameters"]
    assert (settings["scheduler"], settings["strength"], settings["masked"]) == ("euler", 0.5, False)
    for wrong, sentence in (
        (["--strength", "0.5"], "--strength goes with --image alone"),
        (
            ["--image", str(tmp_path / "photo.png"), "--strength", "0.1"],
            "--num_inference_steps 4 at a --strength of 0.1",
        ),
        (["--scheduler", "fast"], "--scheduler is 'fast'"),
    ):
        assert main([*paint, *wrong]) == 2
        assert sentence in capsys.readouterr().err
