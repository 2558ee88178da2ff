"""The settings inside a picture, and where it lies."""

import json

import pytest
from PIL import Image

from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.painting.generate import generate, open_for_adapters
from svfit_dreambooth.painting.picture import Picture, free_path, save_picture

SETTINGS = {
    "prompt": "a dog",
    "negative_prompt": "",
    "seed": 9,
    "adapters": {"dog": 0.5},
    "base_model": DEFAULT_BASE,
    "num_inference_steps": 3,
    "guidance_scale": 7.5,
    "width": 8,
    "height": 8,
}


def test_pictures_tell_how_they_were_made(tiny_base, tmp_path):
    model = open_for_adapters([], str(tiny_base), device="cpu")
    (picture,) = generate(model, ["ein Höhlenhund, 狗"], seed=9, num_inference_steps=1, negative_prompt="blur")
    text = Image.open(save_picture(picture, free_path(tmp_path, "dog"))).text
    settings = json.loads(text["svfit"])
    assert settings == picture.settings
    assert settings["prompt"] == "ein Höhlenhund, 狗" and settings["seed"] == 9
    assert text["parameters"].startswith("ein Höhlenhund, 狗\nNegative prompt: blur\nSteps: 1, ")
    assert "Seed: 9" in text["parameters"]


def test_adapters_stand_in_the_text_that_viewers_show(tmp_path):
    path = save_picture(Picture(Image.new("RGB", (8, 8)), SETTINGS, False), tmp_path / "a.png")
    assert "Adapters: dog:0.5" in Image.open(path).text["parameters"]


def test_names_in_another_encoding_are_kept_as_json_spells_them(tmp_path):
    settings = SETTINGS | {"adapters": {"h\udcfcnd": 1.0}}
    path = save_picture(Picture(Image.new("RGB", (8, 8)), settings, False), tmp_path / "a.png")
    assert json.loads(Image.open(path).text["svfit"]) == settings


def test_a_number_that_json_does_not_know_is_never_written(tmp_path):
    settings = SETTINGS | {"guidance_scale": float("nan")}
    with pytest.raises(ValueError, match="JSON compliant"):
        save_picture(Picture(Image.new("RGB", (8, 8)), settings, False), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stem", ["dog", "d" * 300, "狗" * 100, "h\udcfcnd" * 60])
def test_free_paths_fit_into_a_file_system_and_replace_nothing(tmp_path, stem):
    paths = []
    for _ in range(3):
        paths.append(free_path(tmp_path, stem))
        paths[-1].write_bytes(b"x")
    assert len(set(paths)) == 3 and all(path.name[0] == stem[0] for path in paths)
