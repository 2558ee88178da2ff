"""An adapter merged into a model folder of its own."""

import hashlib
import json

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_loading import make_adapter, paint
from test_word import with_word

from svfit_dreambooth import load_adapter, save_adapter, unload_adapter
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing import merged_model as merged_room
from svfit_dreambooth.sharing.merged_model import export_merged, merged_bytes


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    adapter = make_adapter(tiny_pipeline(), rank=7)
    adapter.instance_prompt = "a photo of sks dog"
    return save_adapter(adapter, tmp_path_factory.mktemp("adapters") / "dog.safetensors")


def opened(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def digests(folder):
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.02)])
def test_the_folder_paints_the_adapters_pictures(tiny_base, path, tmp_path, dtype, tolerance):
    before = digests(tiny_base)
    native = open_base_model(str(tiny_base)).pipeline
    base_picture = paint(native)
    load_adapter(native, path, 0.7)
    exported = export_merged(path, open_base_model(str(tiny_base)), tmp_path / "model", scale=0.7, dtype=dtype)
    assert exported.worst_error <= torch.finfo(dtype).eps
    difference = (paint(opened(tmp_path / "model")) - paint(native)).abs().max()
    assert difference <= tolerance < (base_picture - paint(native)).abs().max()
    assert digests(tiny_base) == before
    assert not list(tmp_path.glob(".svfit*"))
    note = json.loads((tmp_path / "model" / "svfit.json").read_text(encoding="utf-8"))
    assert note["scale"] == 0.7 and note["instance_prompt"] == "a photo of sks dog"


def test_its_type_and_size_are_as_said(tiny_base, path, tmp_path):
    base = open_base_model(str(tiny_base))
    said = merged_bytes(base, torch.float16)
    exported = export_merged(path, base, tmp_path / "model")
    weights = sum(file.stat().st_size for file in exported.path.rglob("*.safetensors"))
    assert weights == pytest.approx(said, rel=0.6) and weights > said  # headers weigh in a model this small
    for file in exported.path.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values() if tensor.is_floating_point()} == {torch.float16}
    plain = StableDiffusionPipeline.from_pretrained(exported.path, local_files_only=True)  # no type named: one for all
    assert plain.unet.dtype == plain.text_encoder.dtype == plain.vae.dtype == torch.float32


def test_learned_words(tiny_base, tmp_path):
    base = open_base_model(str(tiny_base))
    (tmp_path / "adapters").mkdir()
    one, several = (
        save_adapter(with_word(base.pipeline, word), tmp_path / "adapters" / f"{word}.safetensors")
        for word in ("sks", "mine")
    )
    load_adapter(base.pipeline, one, 0.5)
    native = paint(base.pipeline)
    unload_adapter(base.pipeline)
    exported = export_merged(one, base, tmp_path / "model", scale=0.5, dtype=torch.float32)
    assert (paint(opened(exported.path)) - native).abs().max() < 1e-4
    base = open_base_model(str(tiny_base))
    with pytest.raises(SVFitError, match="the word 'mine', which is 4 tokens"):
        export_merged(several, base, tmp_path / "other")
    export_merged(several, open_base_model(str(tiny_base)), tmp_path / "other", without_words=True)


def test_refusals_leave_nothing_behind(tiny_base, path, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    base = open_base_model(str(tiny_base))
    with pytest.raises(SVFitError, match="wants a new or empty folder"):
        export_merged(path, base, tmp_path / "full")
    with pytest.raises(SVFitError, match="wants a new or empty folder"):
        export_merged(path, base, tiny_base)
    with pytest.raises(SVFitError, match="not as torch.bfloat16"):
        export_merged(path, base, tmp_path / "model", dtype=torch.bfloat16)
    base.pipeline.unet.conv_in.weight.data[0] = 1e6
    with pytest.raises(SVFitError, match=r"unet.conv_in.weight does not fit into float16: export with dtype float32"):
        export_merged(path, base, tmp_path / "model")
    base = open_base_model(str(tiny_base))
    open_again = merged_room.open_base_model

    def spoilt(name):
        again = open_again(name)
        again.pipeline.vae.decoder.conv_in.bias.data += 1
        return again

    monkeypatch.setattr(merged_room, "open_base_model", spoilt)
    with pytest.raises(SVFitError, match=r"came out wrong and was not kept: vae.decoder.conv_in.bias changed"):
        export_merged(path, base, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["full"]
