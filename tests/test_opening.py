"""Bases as people bring them: what is not whole is refused in a sentence, never made up or passed over."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial

import httpx
import pytest
import torch
from conftest import tiny_pipeline, tiny_sdxl_pipeline, tiny_unet
from diffusers import DiffusionPipeline, Flux2KleinPipeline, LCMScheduler
from flow_bases import tiny_klein
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from single_file import save_single_file

from svfit_dreambooth import TrainConfig
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import as_asked
from svfit_dreambooth.bases.opening import exchange_autoencoder, open_base_model
from svfit_dreambooth.bases.outline import outline_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.features import open_features
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.training.definite import with_base

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.fixture
def copies(tiny_base, tiny_base_xl, tmp_path):
    """A function to a copy of a base that may be damaged."""

    def copy(base="tiny_base"):
        source = {"tiny_base": tiny_base, "tiny_base_xl": tiny_base_xl}[base]
        return shutil.copytree(source, tmp_path / f"copy-{len(list(tmp_path.iterdir()))}")

    return copy


def change_weights(folder, part, change):
    path = folder / part / WEIGHTS[part]
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


def change_json(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("base", "part", "beginning"),
    [
        ("tiny_base", "unet", "conv_in.weight"),
        ("tiny_base", "vae", "decoder.conv_out.bias"),
        ("tiny_base", "text_encoder", "encoder.layers.1."),
        ("tiny_base_xl", "text_encoder", "encoder.layers.0.self_attn.q_proj."),
        ("tiny_base_xl", "text_encoder_2", "text_projection."),
    ],
)
def test_missing_weights_are_named_and_never_made_up(copies, base, part, beginning):
    folder = copies(base)

    def lose(weights):
        lost = [name for name in weights if beginning in name]
        assert lost
        for name in lost:
            del weights[name]

    change_weights(folder, part, lose)
    with pytest.raises(SVFitError, match=f"the {part} of .* lacks .*{beginning}"):
        open_base_model(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_of_another_network_are_named(copies, part):
    folder = copies()
    change_weights(folder, part, lambda weights: weights.update({"somebody.elses.weight": torch.zeros(3)}))
    with pytest.raises(SVFitError, match=f"the {part} of .* holds, beside its own, somebody.elses.weight"):
        open_base_model(str(folder))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_no_numbers(copies, part):
    folder = copies()
    change_weights(folder, part, lambda weights: weights[max(weights)].view(-1)[0].fill_(float("nan")))
    with pytest.raises(SVFitError, match=f"the {part} of .* holds NaN or infinity in"):
        open_base_model(str(folder))


@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95pickle", None])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_broken_weight_files_are_a_sentence(copies, part, content):
    folder = copies()
    path = folder / part / WEIGHTS[part]
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(SVFitError, match=f"the base model {folder} cannot be opened"):
        open_base_model(str(folder))


def test_a_tokenizer_without_its_vocabulary(copies):
    folder = copies()
    for path in (folder / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    with pytest.raises(SVFitError, match="its vocabulary is not whole|cannot be opened"):
        open_base_model(str(folder))


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_that_lost_merges(copies, part):
    folder = copies("tiny_base_xl")
    path = folder / part / "tokenizer.json"
    content = json.loads(path.read_text())
    assert len(content["model"]["merges"]) > 3
    content["model"]["merges"] = content["model"]["merges"][:3]
    path.write_text(json.dumps(content))
    with pytest.raises(
        SVFitError, match="lacks the merges of [0-9]+ tokens, such as '.*</w>': its files are not whole"
    ):
        open_base_model(str(folder))


def test_a_tokenizer_with_words_that_the_encoder_does_not_know(copies):
    folder = copies()
    pipeline = tiny_pipeline()
    pipeline.tokenizer.add_tokens(["zwx"])
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    with pytest.raises(SVFitError, match="tokens beyond the .* that the encoder knows"):
        open_base_model(str(folder))


@pytest.mark.parametrize(("given", "expected"), [(10**30, 77), (225, 77), (20, 20)])
def test_no_prompt_is_longer_than_the_encoder_reads(copies, given, expected):
    folder = copies()
    change_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=given)
    model = open_base_model(str(folder))
    assert model.pipeline.tokenizer.model_max_length == expected
    assert model.family.tokenize(["a dog"])["text_encoder"].shape == (1, expected)


def test_a_length_of_prompts_that_cannot_be(copies):
    folder = copies()
    change_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=-5)
    with pytest.raises(SVFitError, match="reads -5 tokens"):
        open_base_model(str(folder))


def test_bases_for_other_shapes_than_squares(copies):
    folder = copies()
    change_json(folder / "unet" / "config.json", sample_size=[4, 16])
    assert open_base_model(str(folder)).resolution == 16  # as many pixels as 4 * 16 latents of 2 * 2
    for wrong in (None, [8], "large", 0):
        change_json(folder / "unet" / "config.json", sample_size=wrong)
        with pytest.raises(SVFitError, match="sample_size"):
            open_base_model(str(folder))


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("unet/config.json", {"block_out_channels": "wide"}),
        ("text_encoder/config.json", {"hidden_size": "wide"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}),
        ("model_index.json", {"tokenizer": ["transformers", "NoTokenizer"]}),
        ("model_index.json", {"unet": [None, None]}),
    ],
)
def test_configs_that_say_nonsense_are_a_sentence(copies, file, entries):
    folder = copies()
    change_json(folder / file, **entries)
    with pytest.raises(SVFitError, match=str(folder)):
        open_base_model(str(folder)).family.noising()


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
def test_configs_that_are_lists_are_a_sentence(copies, file):
    folder = copies()
    (folder / file).write_text("[]")
    with pytest.raises(SVFitError, match=str(folder)):
        open_base_model(str(folder))


def test_units_of_latents_are_those_of_the_pipeline(copies):
    """SDXL's pipeline decodes by mean and spread of each channel where there are some; the other refuses them."""
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 4.0]
    folder = copies("tiny_base_xl")
    plain = open_base_model(str(folder)).family
    change_json(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    family = open_base_model(str(folder)).family
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    z = plain.encode_images(pixels)[0] / plain.pipeline.vae.config.scaling_factor
    shift, spread = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    latents = family.encode_images(pixels)[0]
    assert torch.allclose(latents, (z - shift) / spread * family.pipeline.vae.config.scaling_factor, atol=1e-5)
    (own,) = family.decode_latents(latents, 16, 16)
    (expected,) = plain.decode_latents(z * plain.pipeline.vae.config.scaling_factor, 16, 16)
    assert max(abs(a - b) for a, b in zip(own.tobytes(), expected.tobytes(), strict=True)) <= 1
    folder = copies()
    change_json(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    with pytest.raises(SVFitError, match="has latents_mean, which pipelines of its family ignore"):
        open_base_model(str(folder))


@pytest.mark.parametrize("factor", ["0.1", 0, None, float("nan")])
def test_latents_without_a_unit(copies, factor):
    folder = copies()
    change_json(folder / "vae" / "config.json", scaling_factor=factor)
    with pytest.raises(SVFitError, match="no unit of latents in its config"):
        open_base_model(str(folder))


def test_networks_that_are_told_their_guidance_paint_but_are_not_trained(copies):
    folder = copies()
    tiny_unet(time_cond_proj_dim=8).save_pretrained(folder / "unet")
    model = open_base_model(str(folder))
    with pytest.raises(SVFitError, match="distilled to be told its guidance"):
        model.family.noising()


def test_networks_that_are_told_classes(copies):
    folder = copies()
    tiny_unet(num_class_embeds=3).save_pretrained(folder / "unet")
    with pytest.raises(SVFitError, match="is told more than prompts"):
        open_base_model(str(folder))


def test_samplers_without_a_schedule(copies):
    folder = copies()
    model = open_base_model(str(folder))
    model.pipeline.scheduler.register_to_config(beta_start=None)
    sampler = type("Sampler", (), {"config": {"prediction_type": "epsilon"}})()
    model.pipeline.scheduler = sampler
    with pytest.raises(SVFitError, match="sampled with Sampler, which names no noise schedule"):
        model.family.noising()


# ---------------------------------------------------------------- single files


@pytest.mark.parametrize("key", ["edm_mean", "edm_std", "edm_vpred.sigma_max"])
def test_files_of_models_trained_by_edm(tmp_path, key):
    path = save_single_file(tiny_sdxl_pipeline(), tmp_path / "a.safetensors", extra={key: torch.zeros(4)})
    with pytest.raises(SVFitError, match=f"is trained by EDM, it holds {key}"):
        open_base_model(str(path))


@pytest.mark.parametrize("kind", ["sd", "xl"])
@pytest.mark.parametrize(
    ("lost", "words"),
    [("first_stage_model.", "without autoencoder"), (("cond_stage_model.", "conditioner."), "without text encoder")],
)
def test_files_that_lack_a_network(tmp_path, kind, lost, words):
    pipeline = tiny_pipeline() if kind == "sd" else tiny_sdxl_pipeline()
    path = save_single_file(pipeline, tmp_path / "a.safetensors")
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith(lost)}, path)
    named = type(pipeline).__name__
    with pytest.raises(SVFitError, match=f"is a checkpoint for {named} {words}"):
        open_base_model(str(path))


@pytest.mark.parametrize("beginning", ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_out."])
def test_files_that_lack_a_weight(tmp_path, beginning):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "configs")
    path = save_single_file(pipeline, tmp_path / "a.safetensors")
    save_file({name: tensor for name, tensor in load_file(path).items() if not name.startswith(beginning)}, path)
    with pytest.raises(SVFitError, match="lacks conv_out.weight|lacks decoder.conv_out.weight|cannot be opened"):
        open_base_model(str(path), base_config=str(tmp_path / "configs"))


@pytest.mark.parametrize(
    "entry", ["double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"]
)
def test_single_files_of_transformers_are_told_from_damaged_ones(tmp_path, entry):
    save_file({entry: torch.zeros(2, 2)}, tmp_path / "flux.safetensors")
    with pytest.raises(SVFitError, match=f"holds a transformer, it has an entry {entry}, .*folder or hub id"):
        open_base_model(str(tmp_path / "flux.safetensors"))


def test_a_suffix_in_capitals_is_called_no_pickle(tmp_path):
    path = save_single_file(tiny_pipeline(), tmp_path / "a.safetensors").rename(tmp_path / "A.SAFETENSORS")
    with pytest.raises(SVFitError, match="rename it to A.safetensors"):
        open_base_model(str(path))


def test_the_home_folder_may_be_short(tiny_base, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_base.parent))
    assert open_base_model(f"~/{tiny_base.name}").name == tiny_base.name
    assert as_asked("someone/model~2") == "someone/model~2"


@pytest.mark.parametrize(
    "kind, message",
    [
        (
            GatedRepoError,
            "owner/base cannot be opened: it is gated, so accept its terms on https://huggingface.co/owner/base",
        ),
        (RepositoryNotFoundError, "owner/base cannot be opened: the hub has none of that name, or it is private"),
    ],
)
def test_what_the_hub_has_against_a_base_is_said(monkeypatch, kind, message):
    """As diffusers raises it: the hub's error within one that takes the base for a folder."""

    def load_config(*_, **__):
        try:
            raise kind("401 Client Error.", response=httpx.Response(401, request=httpx.Request("GET", "https://hub")))
        except kind:
            raise OSError("owner/base is not a local folder and is not a valid model identifier") from None

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    with pytest.raises(SVFitError, match=message):
        open_base_model("owner/base")


def test_a_base_that_is_nowhere_to_be_had_is_told_as_such(monkeypatch):
    """By the real libraries, which speak of a missing model_index.json."""
    there = "its files are not on this disk, or not all of them"
    offline = f"cannot be opened: {there}, and HF_HUB_OFFLINE forbids to ask the hub for them."
    own = BaseModel("tiny", tiny_pipeline())
    for open_it in (open_base_model, partial(open_features, "", None), partial(exchange_autoencoder, own)):
        with pytest.raises(SVFitError, match=offline.replace("opened:", "opened( as a CLIPModel)?:")):
            open_it("owner/nowhere")
    with pytest.raises(SVFitError, match=f"the configs of owner/nowhere cannot be read from this disk: {there}"):
        outline_base_model("owner/nowhere")

    def load_config(*_, **__):
        raise OSError("owner/nowhere does not appear to have a file") from fault

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (fault := LocalEntryNotFoundError("not in the cache")).__cause__ = HTTPError("refused")
    with pytest.raises(SVFitError, match=rf"{there}, and the hub cannot be reached .HTTPError.: see whether"):
        open_base_model("owner/nowhere")
    fault.__cause__ = None
    with pytest.raises(SVFitError, match=rf"cannot be opened: {there}\.$"):
        open_base_model("owner/nowhere", local_files_only=True)
    fault = RevisionNotFoundError("no v9", response=httpx.Response(404, request=httpx.Request("GET", "https://hub")))
    with pytest.raises(SVFitError, match=r"cannot be opened: owner/nowhere does not appear to have a file\.$"):
        open_base_model("owner/nowhere", revision="v9")


@pytest.mark.parametrize(
    ("part", "config", "message"),
    [
        ("transformer", {"quantization_config": {"quant_method": "bitsandbytes"}}, "transformer quantised already"),
        ("text_encoder", {"quantization_config": {"quant_method": "gptq"}}, "text_encoder quantised already .gptq."),
        ("vae", None, "owner/base lacks its vae"),
        ("transformer", {}, "whole base is fetched"),
    ],
)
def test_a_base_of_the_hub_is_refused_by_its_small_files_before_it_is_downloaded(
    tmp_path, monkeypatch, part, config, message
):
    tiny_klein().save_pretrained(kept := tmp_path / "hub")
    fetched, path = [], kept / part / "config.json"
    if config is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | config))

    def hf_hub_download(repo_id, filename, *, revision=None, local_files_only=False):
        if not (kept / filename).exists():
            raise EntryNotFoundError(filename)
        fetched.append(filename)
        (tmp_path / "cache" / filename).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(kept / filename, tmp_path / "cache" / filename))

    def download(name, **options):
        raise OSError("the whole base is fetched")

    monkeypatch.setattr("svfit_dreambooth.bases.networks.hf_hub_download", hf_hub_download)
    monkeypatch.setattr(Flux2KleinPipeline, "download", download)
    index = json.loads((kept / "model_index.json").read_text())
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda name, **location: index)
    with pytest.raises(SVFitError, match=message):
        open_base_model("owner/base", revision="main")
    assert set(map(os.path.basename, fetched)) == {"model_index.json", "config.json"}


@pytest.mark.parametrize("one_at_a_time", [True, False])
def test_a_folder_without_a_network_or_with_a_quantised_one_is_refused(tmp_path, one_at_a_time):
    tiny_klein().save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    config = path.read_text()
    path.write_text(json.dumps(json.loads(config) | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(SVFitError, match="holds its transformer quantised already .bitsandbytes."):
        open_base_model(str(tmp_path), one_at_a_time=one_at_a_time)
    path.write_text(config)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor for name, tensor in tensors.items() if "to_qkv_mlp" not in name}, weights)
    with pytest.raises(
        SVFitError, match="the transformer of .* lacks single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    ):
        open_base_model(str(tmp_path), one_at_a_time=one_at_a_time)
    save_file(tensors, weights)
    (tmp_path / "tokenizer").rename(tmp_path / "elsewhere")
    with pytest.raises(SVFitError, match="lacks its tokenizer, there is no such folder in it: give a whole model"):
        open_base_model(str(tmp_path), one_at_a_time=one_at_a_time)
    (tmp_path / "elsewhere").rename(tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "text_encoder")
    with pytest.raises(SVFitError, match="lacks its text_encoder, there is no text_encoder/config.json in it"):
        open_base_model(str(tmp_path), one_at_a_time=one_at_a_time)


@pytest.mark.parametrize(
    ("name", "scheduler", "told", "steps", "guidance", "sign"),
    [
        ("sd-turbo", None, None, 4, 1.0, "its name says turbo"),
        ("SDXL_Lightning_8step", None, None, 8, 1.0, "its name says lightning"),
        ("dream", None, 8, 4, 8.0, "its denoiser is told the guidance"),
        ("dream", LCMScheduler, None, 4, 1.0, "its sampler is LCMScheduler"),
        ("hyperion-8steps", None, None, 25, 7.5, None),
        ("turbosquid", None, None, 25, 7.5, None),
    ],
)
def test_bases_distilled_for_few_steps(tiny_base, tmp_path, caplog, name, scheduler, told, steps, guidance, sign):
    folder = shutil.copytree(tiny_base, tmp_path / name)
    if scheduler is not None:
        pipeline = tiny_pipeline()
        scheduler.from_config(pipeline.scheduler.config).save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        change_json(
            folder / "model_index.json", scheduler=["diffusers", scheduler.__name__], _class_name=index["_class_name"]
        )
    if told is not None:
        tiny_unet(time_cond_proj_dim=told).save_pretrained(folder / "unet")
    base = open_base_model(str(folder))
    assert (base.num_inference_steps, base.guidance_scale) == (steps, guidance)
    said = [record.message for record in caplog.records if "was distilled" in record.message]
    assert len(said) == (sign is not None)
    if sign is not None:
        assert f"({sign}): num_inference_steps {steps} and guidance_scale {guidance:g} are taken" in said[0]
    if told is None:
        (picture,) = generate(base, ["a dog"], height=16, width=16)
        assert picture.settings["num_inference_steps"] == steps and picture.settings["guidance_scale"] == guidance
        (picture,) = generate(base, ["a dog"], height=16, width=16, num_inference_steps=2, guidance_scale=3)
        assert picture.settings["num_inference_steps"] == 2 and picture.settings["guidance_scale"] == 3
        config = TrainConfig(guidance_scale=None, dry_run=True)
        assert with_base(config, base).num_inference_steps == steps
        assert with_base(replace(config, num_inference_steps=7), base).num_inference_steps == 7


def test_transformer_bases_say_by_themselves_that_they_were_distilled():
    few, own = BaseModel("klein", tiny_klein(is_distilled=True)), BaseModel("klein", tiny_klein())
    assert (few.num_inference_steps, few.guidance_scale, own.num_inference_steps) == (4, 1.0, 25)
    assert few.few_steps.sign == "its configs say so" and own.few_steps is None and own.guidance_scale == 4.0
