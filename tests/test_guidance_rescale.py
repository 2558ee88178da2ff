"""Guided answers brought back to the spread of the prompt's: asked for, by itself, and noted in the picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from svfit_dreambooth.commands.main import main
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.from_picture import Begin
from svfit_dreambooth.painting.generate import generate, open_for_adapters
from svfit_dreambooth.painting.jobs import Job, paint_jobs
from svfit_dreambooth.painting.picture import save_picture
from svfit_dreambooth.painting.shelf import Shelf
from svfit_dreambooth.training.base_pictures import picture_files

SMALL = {"num_inference_steps": 3, "height": 16, "width": 16, "guidance_scale": 6.0}


@pytest.fixture
def model(tiny_base):
    return open_for_adapters([], str(tiny_base), device="cpu")


@pytest.fixture
def suited(model):
    """A base that is painted with a rescale unasked."""
    model.family.guidance_rescale = 0.5  # of this one alone
    return model


def painted(model, **options):
    (picture,) = generate(model, ["a dog"], seed=3, **SMALL, **options)
    return np.asarray(picture.image, dtype=int), picture.settings.get("guidance_rescale")


def test_pictures_are_those_of_diffusers(model):
    plain, noted = painted(model)
    rescaled, told = painted(model, guidance_rescale=0.7)
    generator = torch.Generator().manual_seed(3)
    (expected,) = model.pipeline("a dog", generator=generator, guidance_rescale=0.7, **SMALL).images
    assert np.array_equal(rescaled, np.asarray(expected)) and not np.array_equal(rescaled, plain)
    assert (noted, told) == (None, 0.7)


def test_what_suits_a_base_is_taken_and_noted(suited):
    by_itself, noted = painted(suited)
    asked, _ = painted(suited, guidance_rescale=0.5)
    plain, zero = painted(suited, guidance_rescale=0.0)
    assert np.array_equal(by_itself, asked) and not np.array_equal(by_itself, plain)
    assert (noted, zero) == (0.5, 0.0)  # without the note it would be painted with .5 the next time


def test_painting_that_begins_with_a_picture_has_none(suited):
    begin = Begin(Image.new("RGB", (16, 16), "red"), 0.7)
    assert painted(suited, begin=begin)[1] == 0.0
    with pytest.raises(SVFitError, match="guidance_rescale 0.4 does not work here"):
        painted(suited, begin=begin, guidance_rescale=0.4)


@pytest.mark.parametrize("number", [-0.1, 1.5, float("nan")])
def test_numbers_that_are_no_share(model, number):
    with pytest.raises(SVFitError, match=f"guidance_rescale is {number}: give 0 to 1."):
        painted(model, guidance_rescale=number)


@pytest.mark.parametrize("asked", [None, 0.9])
def test_jobs_paint_as_generate_does(suited, asked):
    found = []
    paint_jobs(
        Shelf(suited), [Job("a dog", seed=3), Job("a dog", seed=4)], guidance_rescale=asked,
        on_picture=lambda job, picture: found.append(picture), **SMALL,
    )  # fmt: skip
    expected, noted = painted(suited, guidance_rescale=asked)
    assert np.abs(np.asarray(found[0].image, dtype=int) - expected).max() <= 1
    assert found[0].settings["guidance_rescale"] == noted == (asked or 0.5)


def test_the_commands_pass_it_on(tiny_base, tmp_path, capsys):
    base = [
        "--pretrained_model_name_or_path",
        str(tiny_base),
        "--guidance_rescale",
        "0.7",
        "--num_inference_steps",
        "1",
    ]
    (tmp_path / "jobs").write_text('{"prompt": "a dog"}\n')
    for asked in (["--prompt", "a dog", "--num_images", "1"], ["--jobs", str(tmp_path / "jobs")]):
        assert not main(["generate", *base, *asked, "--output_dir", str(tmp_path / "pictures")])
        path = capsys.readouterr().out.split("\n")[0]
        text = Image.open(path).text
        assert json.loads(text["svfit"])["guidance_rescale"] == 0.7
        assert "CFG scale: 7.5, CFG rescale: 0.7, Seed: 0" in text["parameters"]


def test_viewers_are_told_nothing_where_there_is_none(suited, tmp_path):
    (picture,) = generate(suited, ["a dog"], guidance_rescale=0.0, **SMALL)
    assert "rescale" not in Image.open(save_picture(picture, tmp_path / "a.png")).text["parameters"]


def test_the_bases_own_pictures_are_kept_under_it(model):
    def places():
        return picture_files(model, ["a dog"], 16, torch.float32)

    plain = places()
    model.family.guidance_rescale = 0.5
    assert places() != plain
