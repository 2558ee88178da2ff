"""The tab of adapters: sums of several, LoRAs for other programs."""

from pathlib import Path
from zipfile import ZipFile

import pytest

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from web_stand_ins import Request

from svfit_dreambooth import TrainConfig, read_adapter, train
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.tabs.export import LAYOUTS, LoraMaker
from svfit_dreambooth.web.tabs.library import Shelf


def test_lora_of_a_library_adapter(home, dog_adapter, tiny_base, monkeypatch):
    visitor = home.visitor(Request("a" * 32))
    library.add(visitor.library, dog_adapter, name="for-lora")
    layout = next(name for name, value in LAYOUTS.items() if value == "diffusers")
    maker = LoraMaker(home)
    said, _ = maker.plan("for-lora", layout, "", Request("a" * 32))
    assert "LoRA" in said or "rank" in said
    said, button = maker.make("for-lora", layout, "", False, Request("a" * 32))
    assert "compared with the adapter" in said and Path(button.value["path"]).stat().st_size > 1000


def test_what_the_page_cannot_do_alone_it_offers(home, tiny_base, photo_folder, tmp_path):
    request, folder = Request("a" * 32), home.visitor(Request("a" * 32)).library
    for name, options in (("word", {"learned_word": "sks"}), ("keys", {"target_modules": ["to_k"]})):
        config = TrainConfig(
            pretrained_model_name_or_path=str(tiny_base), instance_data_dir=str(photo_folder), resolution=16,
            instance_prompt="a photo of sks dog", max_train_steps=1, fixed_loss_examples=0, final_pictures=False,
            adapter_name=name, output_dir=str(tmp_path / name), **options,
        )  # fmt: skip
        library.add(folder, train(config).adapter_path)
    layout = next(iter(LAYOUTS))
    said, button = LoraMaker(home).make("word", layout, "", False, request)
    assert "in other programs write word-lora-sks in its place" in said
    with ZipFile(button.value["path"]) as packed:
        assert sorted(packed.namelist()) == ["word-lora-sks.safetensors", "word-lora.safetensors"]
    said, button = LoraMaker(home).make("word", layout, "", True, request)
    assert "compared with the adapter" in said and "word-lora-sks" not in said
    assert button.value["path"].endswith("word-lora.safetensors")
    assert Shelf(home).combine(["word", "keys"], "0.5 0.25", "of different layers", 0, request) == 1
    for wrong, said in (("0,5", "write 0.5 for a half"), ("nan 1", "write a number"), ("1", "write 2 numbers")):
        with pytest.raises(Exception, match=said):
            Shelf(home).combine(["word", "keys"], wrong, "another", 0, request)
    assert home.studio.line.is_free
    both = read_adapter(folder / "of-different-layers.safetensors")
    word, keys = (read_adapter(folder / f"{name}.safetensors").shifts for name in ("word", "keys"))
    for name, shift in both.shifts.items():
        assert abs(shift - 0.5 * word[name] - 0.25 * keys.get(name, 0.0)).max() < 2e-3
    assert set(both.shifts) == set(word)
