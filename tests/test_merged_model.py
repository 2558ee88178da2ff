"""An adapter merged into a model of its own: a folder, or one file in the original layout."""

import hashlib
import json
import os

import pytest
import torch
from conftest import tiny_pipeline, tiny_text_encoder, tiny_unet
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
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


def version_2(tmp_path):
    """A base that is told apart as Stable Diffusion 2: prompts 1024 wide, read by OpenCLIP, predicts v."""
    pipeline = tiny_pipeline(prediction_type="v_prediction")
    torch.manual_seed(0)
    encoder = tiny_text_encoder(len(pipeline.tokenizer), width=1024)
    pipeline.register_modules(text_encoder=encoder, unet=tiny_unet(cross_attention_dim=1024))
    pipeline.save_pretrained(tmp_path / "v2")
    return tmp_path / "v2"


@pytest.mark.parametrize("kind", ["v1", pytest.param("v2", marks=pytest.mark.slow), "xl"])
def test_one_file_is_read_by_diffusers_to_the_same_weights(kind, tiny_base, tiny_base_xl, tmp_path):
    folder = {"v1": tiny_base, "xl": tiny_base_xl}.get(kind) or version_2(tmp_path)
    base = open_base_model(str(folder))
    adapter = save_adapter(make_adapter(base.pipeline, rank=2), tmp_path / "dog.safetensors")
    umask = os.umask(0o022)
    try:
        exported = export_merged(adapter, base, tmp_path / "one.safetensors", dtype=torch.float16)
    finally:
        os.umask(umask)
    assert exported.path.stat().st_mode & 0o777 == 0o644 and exported.bytes == exported.path.stat().st_size
    assert not list(tmp_path.glob(".svfit*"))

    export_merged(adapter, open_base_model(str(folder)), tmp_path / "folder", dtype=torch.float16)
    expected = open_base_model(str(tmp_path / "folder")).pipeline
    read = type(expected).from_single_file(
        str(exported.path), config=str(folder), local_files_only=True, dtype=torch.float32
    )
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (part := getattr(expected, name, None)) is not None:
            theirs = getattr(read, name).state_dict()
            assert all(torch.equal(theirs[key], tensor) for key, tensor in part.state_dict().items()), name
    with safe_open(exported.path, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
        assert {file.get_slice(key).get_dtype() for key in keys} == {"F16"}
    assert metadata["modelspec.architecture"] == {
        "v1": "stable-diffusion", "v2": "stable-diffusion-v2-768-v", "xl": "stable-diffusion-xl-v1-base",
    }[kind]  # fmt: skip
    assert ("cond_stage_model.model.text_projection" in keys) == (kind == "v2")


def test_an_sdxl_that_predicts_v_says_so(tiny_base_xl, tmp_path):
    base = open_base_model(str(tiny_base_xl))
    scheduler = base.pipeline.scheduler
    base.pipeline.register_modules(
        scheduler=scheduler.from_config(scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    )
    adapter = save_adapter(make_adapter(base.pipeline, rank=2), tmp_path / "dog.safetensors")
    export_merged(adapter, base, tmp_path / "one.safetensors")
    again = open_base_model(str(tmp_path / "one.safetensors"), base_config=str(tiny_base_xl))
    assert again.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert again.pipeline.scheduler.config.rescale_betas_zero_snr


def test_one_file_replaces_nothing_unasked_and_not_every_base_has_a_layout(tiny_base, tiny_base_v, path, tmp_path):
    output = tmp_path / "one.safetensors"
    output.write_bytes(path.read_bytes())
    with pytest.raises(SVFitError, match="exists already"):
        export_merged(path, open_base_model(str(tiny_base)), output)
    with pytest.raises(SVFitError, match="which must not be replaced"):
        export_merged(path, open_base_model(str(tiny_base)), path, overwrite=True)
    export_merged(path, open_base_model(str(tiny_base)), output, overwrite=True)
    assert output.read_bytes() != path.read_bytes()
    with pytest.raises(SVFitError, match="an AutoencoderTiny, for which the layout of one file has no names"):
        export_merged(path, open_base_model(str(tiny_base_v)), tmp_path / "two.safetensors", allow_other_base=True)
    assert not (tmp_path / "two.safetensors").exists()
