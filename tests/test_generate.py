"""Pictures from prompts and adapters, by library and by command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image

from svfit_dreambooth import TrainConfig, read_adapter, save_adapter, train
from svfit_dreambooth.adapter.source import distinct_names, split_strength
from svfit_dreambooth.commands.main import main, main_train
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import generate, open_for_adapters

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def adapter_path(tiny_base, photo_folder, tmp_path_factory):
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base),
        instance_data_dir=str(photo_folder),
        instance_prompt="a photo of sks dog",
        output_dir=str(tmp_path_factory.mktemp("run")),
        max_train_steps=8,
        resolution=16,
        learning_rate=0.5,
        train_text_encoder=True,
        fixed_loss_examples=0,
    )
    return train(config).adapter_path


def pixels(path_or_image):
    image = path_or_image if isinstance(path_or_image, Image.Image) else Image.open(path_or_image)
    return np.asarray(image.convert("RGB"), dtype=int)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog.safetensors", ("dog.safetensors", 1.0)),
        ("dog.safetensors:0.7", ("dog.safetensors", 0.7)),
        ("dog.safetensors:-1", ("dog.safetensors", -1.0)),
        (r"C:\files\dog.safetensors", (r"C:\files\dog.safetensors", 1.0)),
        (r"C:\files\dog.safetensors:1e-1", (r"C:\files\dog.safetensors", 0.1)),
        ("odd:name", ("odd:name", 1.0)),
    ],
)
def test_split_strength(text, expected):
    assert split_strength(text) == expected


def test_seeds_reproduce_and_count_up(tiny_base):
    model = open_for_adapters([], str(tiny_base), device="cpu")
    options = {"num_inference_steps": 2, "height": 16, "width": 16}
    first, second = generate(model, ["a dog"], num_images=2, seed=5, **options)
    (again,) = generate(model, ["a dog"], seed=6, **options)
    assert np.array_equal(pixels(second.image), pixels(again.image))
    assert not np.array_equal(pixels(first.image), pixels(second.image))
    assert (first.settings["seed"], second.settings["seed"]) == (5, 6)


def test_denoising_steps_are_told_and_can_stop(tiny_base):
    model = open_for_adapters([], str(tiny_base), device="cpu")
    options = {"num_images": 3, "num_inference_steps": 4, "height": 16, "width": 16}
    told = []

    def stop_in_the_second_picture(step, of):
        told.append((step, of))
        return len(told) == 6

    pictures = generate(model, ["a dog"], on_denoising_step=stop_in_the_second_picture, **options)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4), (1, 4), (2, 4)]
    (first, *others) = generate(model, ["a dog"], **options)
    assert len(others) == 2 and len(pictures) == 1
    assert np.array_equal(pixels(first.image), pixels(pictures[0].image))


def test_adapter_in_a_fresh_process_gives_the_same_pictures(tiny_base, adapter_path, tmp_path):
    model = open_for_adapters([(adapter_path, 1.0)], str(tiny_base), device="cpu")
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 2.0}
    pictures = generate(model, ["a photo of sks dog"], num_images=2, seed=3, **options)
    command = [sys.executable, "-m", "svfit_dreambooth", "generate", "--adapter", str(adapter_path)]
    command += ["--prompt", "a photo of sks dog", "--output_dir", str(tmp_path), "--seed", "3", "--num_images", "2"]
    command += ["--pretrained_model_name_or_path", str(tiny_base), "--num_inference_steps", "2"]
    command += ["--guidance_scale", "2", "--height", "16", "--width", "16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) == 2
    for picture, file in zip(pictures, files, strict=True):
        assert np.abs(pixels(picture.image) - pixels(file)).max() <= 1
    base = generate(open_for_adapters([], str(tiny_base), device="cpu"), ["a photo of sks dog"], seed=3, **options)
    assert np.abs(pixels(base[0].image) - pixels(files[0])).max() > 3


def test_strength_zero_is_the_base(tiny_base, adapter_path):
    options = {"num_inference_steps": 2, "height": 16, "width": 16}
    adapted = open_for_adapters([(adapter_path, 0.0)], str(tiny_base), device="cpu")
    base = open_for_adapters([], str(tiny_base), device="cpu")
    first, second = (generate(model, ["a dog"], **options)[0].image for model in (adapted, base))
    assert np.array_equal(pixels(first), pixels(second))


def test_a_file_never_starts_a_download(adapter_path, tmp_path):
    adapter = read_adapter(adapter_path)
    for name in ("someone/their-model", "someone/their-model@main"):
        adapter.base_model = name
        path = save_adapter(adapter, tmp_path / "stranger.safetensors")
        with pytest.raises(SVFitError, match="is not on this disk, and what a file names is not downloaded"):
            open_for_adapters([(path, 1.0)])
    with pytest.raises(SVFitError, match="a base called 'tiny-kl', which cannot be found by that name"):
        open_for_adapters([(adapter_path, 1.0)])


def test_options_of_a_base_that_only_the_adapter_names(adapter_path, tmp_path, capsys, monkeypatch):
    adapter = read_adapter(adapter_path)
    adapter.base_model = "someone/half@v1"
    path = save_adapter(adapter, tmp_path / "dog.safetensors")
    snapshots = Path(HF_HUB_CACHE) / "models--someone--half" / "snapshots"
    for revision in ("v1", "v2"):
        tiny_pipeline("kl").save_pretrained(snapshots / ("0123" + revision), variant="fp16")
        reference = snapshots.parent / "refs" / revision
        reference.parent.mkdir(exist_ok=True)
        reference.write_text("0123" + revision)
    with pytest.raises(SVFitError, match="someone/half@v1, which is only partly on this disk, and"):
        open_for_adapters([(path, 1.0)], device="cpu")
    assert open_for_adapters([(path, 1.0)], device="cpu", variant="fp16").name == "someone/half@v1"
    model = open_for_adapters([(path, 1.0)], device="cpu", variant="fp16", revision="v2")
    assert model.name == "someone/half@v2"
    with pytest.raises(SVFitError, match="is not on this disk with revision v3 variant fp16, and"):
        open_for_adapters([(path, 1.0)], device="cpu", variant="fp16", revision="v3")
    for given, said in ((["--variant", "fp16"], ""), (["--base_config", "b"], "--base_config b does not apply to the")):
        assert main(["inspect", str(path), "--plot", str(tmp_path / f"{given[1]}.png"), *given]) == 0
        text = capsys.readouterr().out
        assert ("are not drawn" in text) == bool(said) and said in text
    for option in ("variant", "revision", "base_config"):
        with pytest.raises(SVFitError, match=f"^{option} fp16 does not apply to the base toybox"):
            open_for_adapters([], **{option: "fp16"})


def test_a_wrong_size_is_refused(tiny_base):
    model = open_for_adapters([], str(tiny_base), device="cpu")
    with pytest.raises(SVFitError, match="width 17 does not work"):
        generate(model, ["a dog"], width=17)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_images": 0}, "num_images is 0"),
        ({"num_images": 10**30}, "num_images is 10{30}"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001: give 1 to 1000"),
        ({"seed": 2**64}, f"seed is {2**64}"),
        ({"seed": 2**64 - 1, "num_images": 2}, f"give at most {2**64 - 2}"),
        ({"height": 10**8}, "height 100000000 does not work"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"negative_prompt": "blur\udcff"}, "no UTF-8 text"),
    ],
)
def test_numbers_that_no_base_paints_with(tiny_base, options, said):
    model = open_for_adapters([], str(tiny_base), device="cpu")
    with pytest.raises(SVFitError, match=said):
        generate(model, ["a dog"], **options)


def test_the_last_seed_paints(tiny_base):
    model = open_for_adapters([], str(tiny_base), device="cpu")
    options = {"num_inference_steps": 1, "height": 16, "width": 16}
    (picture,) = generate(model, ["a dog"], seed=2**64 - 1, **options)
    assert picture.settings["seed"] == 2**64 - 1


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf"])
def test_strengths_that_are_no_numbers(strength):
    with pytest.raises(SVFitError, match=f"the strength of dog.safetensors is {strength}"):
        split_strength(f"dog.safetensors:{strength}")
    with pytest.raises(SVFitError, match="give a finite number"):
        open_for_adapters([("dog.safetensors", float(strength))])


@pytest.mark.parametrize(
    ("stems", "names"),
    [
        (["a", "a", "b", "a"], ["a", "a-2", "b", "a-3"]),
        (["a-3", "a", "a", "a"], ["a-3", "a", "a-2", "a-4"]),
        (["a-2", "a", "a"], ["a-2", "a", "a-3"]),
        ([], []),
    ],
)
def test_names_of_equal_files_are_distinct(stems, names):
    assert distinct_names(stems) == names


def test_numbered_names_leave_room_for_those_that_others_have():
    assert distinct_names(["a", "a", "a-2"], reserved={"a", "a-2"}) == ["a", "a-3", "a-2"]


def test_inspect(adapter_path, capsys):
    assert main(["inspect", str(adapter_path)]) == 0
    text = capsys.readouterr().out
    assert "base model: tiny-kl" in text and "instance prompt: a photo of sks dog" in text
    assert "text_encoder" in text and "total" in text
    assert main(["inspect", str(adapter_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["projections"] == 40


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "/no/file.safetensors"], "/no/file.safetensors"),
        (["generate", "--prompt", "a dog"], "--output_dir"),
        (["generate", "--adapter", "/no/file", "--prompt", "a", "--output_dir", "out"], "/no/file"),
        (["paint"], "invalid choice: 'paint'"),
    ],
)
def test_commands_fail_with_one_sentence(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and "Traceback" not in error


def test_the_training_command_end_to_end(tiny_base, photo_folder, tmp_path, capsys):
    arguments = ["--pretrained_model_name_or_path", str(tiny_base), "--instance_data_dir", str(photo_folder)]
    arguments += ["--instance_prompt", "a photo of sks dog", "--output_dir", str(tmp_path / "out dir")]
    arguments += ["--max_train_steps", "3", "--resolution", "16", "--num_inference_steps", "1"]
    assert main_train([*arguments, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "max_train_steps: 3" in text and "3 photos" in text and "32 layers, 624 singular values" in text
    assert not (tmp_path / "out dir").exists()
    assert main_train(arguments) == 0
    text = capsys.readouterr().out
    assert "3 steps in" in text and "624 singular values trained" in text
    assert Image.open(tmp_path / "out dir" / "my-dog.png").width > 500
    assert {path.name for path in (tmp_path / "out dir").iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "curve.png",
        "my-dog.png",
        "my-dog.safetensors",
        "progress.jsonl",
    }


def test_the_training_command_fails_with_one_sentence_and_nothing_else():
    """Also where the terminal knows ASCII alone: what it cannot show is escaped."""
    command = [sys.executable, str(ROOT / "train_dreambooth_svfit.py"), "--instance_data_dir", "/no/Füße"]
    ascii_alone = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=ascii_alone, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: There is no folder '/no/F\\xfc\\xdfe': check the path of your photos.\n"


def test_half_precision(tiny_base, adapter_path):
    model = open_for_adapters([(adapter_path, 1.0)], str(tiny_base), device="cpu", dtype=torch.bfloat16)
    assert model.pipeline.unet.dtype == torch.bfloat16
    (picture,) = generate(model, ["a dog"], num_inference_steps=1, height=16, width=16)
    assert picture.image.size == (16, 16)
