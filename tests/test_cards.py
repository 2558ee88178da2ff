"""What generators show beside a LoRA."""

import json

from conftest import tiny_pipeline
from PIL import Image
from test_loading import make_adapter

from svfit_dreambooth import read_adapter, save_adapter
from svfit_dreambooth.adapter.describe import annotate_adapter
from svfit_dreambooth.commands.main import main
from svfit_dreambooth.sharing.cards import write_cards


def test_preview_and_notes_lie_beside_the_file_and_replace_nothing(tiny_base, tmp_path, capsys):
    adapter = make_adapter(tiny_pipeline(), rank=2)
    adapter.instance_prompt, adapter.training = "a photo of sks dog", {"clip_skip": 1, "photos": 3}
    adapter.architecture = "stable-diffusion-v1"
    path = save_adapter(adapter, tmp_path / "dog.safetensors")
    annotate_adapter(path, thumbnail=Image.new("RGB", (300, 300), (200, 30, 30)))
    output = tmp_path / "lora" / "dog.safetensors"
    arguments = ["export", str(path), "--format", "kohya", "--output", str(output)]
    arguments += ["--pretrained_model_name_or_path", str(tiny_base)]
    assert main(arguments) == 0
    assert {file.name for file in output.parent.iterdir()} == {"dog.safetensors", "dog.preview.png", "dog.json"}
    with Image.open(output.with_suffix(".preview.png")) as preview:
        assert preview.format == "PNG" and preview.size == (256, 256) and preview.getpixel((9, 9))[0] > 190
    card = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert card["activation text"] == "a photo of sks dog" and card["sd version"] == "SD1"
    assert card["preferred weight"] == 1 and "Clip skip: 2" in card["notes"] and "Base: tiny" in card["notes"]

    output.with_suffix(".json").write_text("my notes")
    capsys.readouterr()
    assert main([*arguments, "--overwrite"]) == 0
    assert f"{output.with_suffix('.json')} is there already and stays as it is" in capsys.readouterr().out
    assert output.with_suffix(".json").read_text() == "my notes"


def test_without_a_thumbnail_there_is_no_preview(tmp_path):
    path = save_adapter(make_adapter(tiny_pipeline(), rank=2), tmp_path / "dog.safetensors")
    assert write_cards(tmp_path / "lora.safetensors", read_adapter(path)) == [str(tmp_path / "lora.json")]
    assert json.loads((tmp_path / "lora.json").read_text())["sd version"] == "Unknown"
