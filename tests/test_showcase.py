"""The picture and the figures at the end of a run on the embedded base."""

import contextlib
import io

import pytest
from PIL import Image

from svfit_dreambooth import read_adapter
from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.commands.main import main, main_train
from svfit_dreambooth.painting.sheets import CELL


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of the command's run without arguments but those that make it short, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    arguments = ["--output_dir", str(folder), "--max_train_steps", "2", "--num_inference_steps", "2"]
    with contextlib.redirect_stdout(printed):
        assert main_train([*arguments, "--fixed_loss_examples", "1", "--validation_steps", "0"]) == 0
    return folder, printed.getvalue()


def test_without_arguments_a_toybox_subject_is_trained(demo):
    folder, _ = demo
    adapter = read_adapter(folder / "dog_patch.safetensors")
    assert adapter.base_model == DEFAULT_BASE and adapter.instance_prompt == "a photo of sks dog"
    assert Image.open(folder / "dog_patch.png").height > 3 * CELL


def test_the_judge_speaks_of_base_and_adapter(demo):
    _, text = demo
    assert "judged in settings without a photo" in text
    rows = {
        line[:15].strip(): line[15:].split() for line in text.splitlines() if line.startswith(("base  ", "adapter  "))
    }
    assert float(rows["base"][-1]) == 0.0  # the base does not drift from itself
    assert all(-1 <= float(row[0]) <= 1 for row in rows.values())


def test_the_adapter_finds_the_embedded_base_from_anywhere(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "generate",
        "--adapter",
        str(demo[0] / "dog_patch.safetensors"),
        "--prompt",
        "a photo of sks dog in the snow",
    ]
    assert main([*arguments, "--output_dir", "images", "--num_images", "1", "--num_inference_steps", "2"]) == 0
    assert Image.open(tmp_path / capsys.readouterr().out.strip()).size == (64, 64)
