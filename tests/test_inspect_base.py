"""What carries a base: shares, the command, the picture."""

import json

import pytest
import torch
from PIL import Image

from svfit_dreambooth.commands.main import main
from svfit_dreambooth.training import sensitivity as room
from svfit_dreambooth.training.sensitivity import Sensitivity
from svfit_dreambooth.training.sensitivity_report import describe_sensitivity, plot_sensitivity

PREFIX = "unet.down_blocks"
FOUND = Sensitivity(
    {
        f"{PREFIX}.10.attn1.to_q": torch.tensor([6.0, 1.0, 1.0]),
        f"{PREFIX}.2.attn1.to_q": torch.tensor([1.0, 0.5]),
        f"{PREFIX}.2.attn1.to_v": torch.tensor([0.5]),
    },
    power=2.5,
    error=0.25,
)


def test_shares_and_how_few_values_carry_half():
    described = describe_sensitivity(FOUND)
    assert described["total"] == {"layers": 3, "values": 6, "share": 1.0, "half": 1}
    assert list(described["blocks"]) == ["unet down_blocks.2", "unet down_blocks.10"]
    assert described["blocks"]["unet down_blocks.2"] == {
        "layers": 2,
        "values": 3,
        "share": pytest.approx(0.2),
        "half": 1,
    }
    assert next(iter(described["layers"])).endswith("10.attn1.to_q")
    assert described["change"] == pytest.approx(2.0) and described["error"] == 0.25  # sqrt(10 / 2.5)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(room, "PICTURES", 1)
    monkeypatch.setattr(room, "STEPS", 1)
    monkeypatch.setattr(room, "PASSES", 2)


def test_the_command_tells_what_carries_a_base(tiny_base, tmp_path, capsys, quick):
    base = ["inspect", "--pretrained_model_name_or_path", str(tiny_base)]
    picture = tmp_path / "carried.png"
    assert main([*base, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "unet down_blocks.0" in out and "100.00%" in out and f"drawn: {picture}" in out
    assert Image.open(picture).width > 800
    assert main([*base, "--plot", str(picture)]) == 2  # nothing is overwritten unasked
    capsys.readouterr()
    assert main([*base, "--json", "--target_modules", "conv", "--train_text_encoder"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["base_model"] == "tiny-kl" and any(name.startswith("text_encoder") for name in described["blocks"])
    assert sum(row["share"] for row in described["blocks"].values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "name an adapter, or a base with --pretrained_model_name_or_path"),
        (["a.safetensors", "--target_modules", "all"], "--target_modules is for a base, and a.safetensors is named"),
    ],
)
def test_what_the_command_cannot_do_is_a_sentence(arguments, sentence, capsys):
    assert main(["inspect", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_zeros_can_be_drawn(tmp_path):
    values = {name: own.clone().index_fill(0, torch.tensor(0), 0.0) for name, own in FOUND.values.items()}
    assert plot_sensitivity(Sensitivity(values, 1.0, 0.1), "tiny", tmp_path / "a.png").is_file()
