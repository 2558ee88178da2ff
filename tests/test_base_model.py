"""Every family of base model: opened from wherever it lies, encoded as its own pipeline does it, trained and loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import offload_sequentially, tiny_pipeline, tiny_sdxl_pipeline
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub.constants import HF_HUB_CACHE
from single_file import save_single_file
from torch import nn

from svfit_dreambooth import TrainConfig, load_adapter, read_adapter, train
from svfit_dreambooth.bases.families import family_of, pipeline_components
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.bases.sdxl import SDXL
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import generate, open_for_adapters, open_named_base
from svfit_dreambooth.training.examples import encode_examples
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.plan import prepare

CPU = torch.device("cpu")
PROMPT = "a photo of sks dog"
PICTURE = {"num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 2.0}


@pytest.fixture(params=["tiny_base", "tiny_base_v", "tiny_base_xl"])
def family(request):
    """Folder of a base: epsilon, v-prediction with another kind of autoencoder, SDXL."""
    return request.getfixturevalue(request.param)


def options(base, photos, output, **changes):
    return {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(photos),
        "instance_prompt": PROMPT,
        "output_dir": str(output),
        "max_train_steps": 3,
        "train_batch_size": 2,
        "resolution": 16,
        "fixed_loss_examples": 1,
        "final_pictures": False,
        "learning_rate": 0.5,
        "text_encoder_lr": 0.5,
        **changes,
    }


def paint(pipeline, **changes):
    arguments = {**PICTURE, "generator": torch.Generator().manual_seed(3), "output_type": "np", **changes}
    return pipeline(PROMPT, **arguments).images[0]


def same_weights(first, second):
    for name, module in {**pipeline_components(first), "vae": first.vae}.items():
        own, other = module.state_dict(), getattr(second, name).state_dict()
        assert set(own) == set(other) and all(torch.equal(own[key], other[key]) for key in own), name
    return True


def test_round_trip(family, photo_folder, tmp_path):
    """Photos to adapter to pictures: the same from our commands and on anybody's diffusers pipeline."""
    result = train(TrainConfig(**options(family, photo_folder, tmp_path, train_text_encoder=True)))
    adapter = read_adapter(result.adapter_path)
    encoders = ["text_encoder", "text_encoder_2"] if "xl" in family.name else ["text_encoder"]
    assert adapter.components == [*encoders, "unet"]
    assert all(shift.any() for shift in adapter.shifts.values())
    pipeline = DiffusionPipeline.from_pretrained(family, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    base = paint(pipeline)
    load_adapter(pipeline, result.adapter_path)
    adapted = paint(pipeline)
    assert np.abs(adapted - base).max() > 0.01
    model = open_for_adapters([(result.adapter_path, 1.0)], str(family), device="cpu")
    (picture,) = generate(model, [PROMPT], seed=3, **PICTURE)
    assert np.abs(np.asarray(picture.image) / 255 - adapted).max() < 2 / 255


def test_runs_repeat_to_the_bit(tiny_base_xl, photo_folder, tmp_path):
    paths = [
        train(TrainConfig(**options(tiny_base_xl, photo_folder, tmp_path / name, random_flip=True))).adapter_path
        for name in ("a", "b")
    ]
    first, second = (read_adapter(path).shifts for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_adapter(paths[0]).architecture == "stable-diffusion-xl-v1-base"


# ---------------------------------------------------------------- SDXL


def encode_prompts(pipeline, prompts):
    family = family_of(pipeline)
    conditions = family.encode_tokens(family.tokenize(prompts), family.text_encoders)
    return conditions["prompt_embeds"], conditions.get("pooled_prompt_embeds")


def test_prompts_are_encoded_as_the_pipeline_does_it():
    pipeline = tiny_sdxl_pipeline()
    prompts = [PROMPT, "a cat in the snow"]
    embeds, pooled = encode_prompts(pipeline, prompts)
    theirs, _, their_pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert torch.equal(embeds, theirs) and torch.equal(pooled, their_pooled)
    pipeline = tiny_pipeline()
    embeds, pooled = encode_prompts(pipeline, prompts)
    theirs, _ = pipeline.encode_prompt(prompts, CPU, 1, do_classifier_free_guidance=False)
    assert torch.equal(embeds, theirs) and pooled is None


@pytest.mark.parametrize("train_text_encoder", [False, True])
def test_the_unet_is_told_where_its_window_was(tiny_base_xl, photo_folder, tmp_path, train_text_encoder):
    calls = []

    class Recording(nn.Module):
        def forward(self, sample, timestep, encoder_hidden_states, added_cond_kwargs, return_dict):
            calls.append((sample, encoder_hidden_states, added_cond_kwargs))
            return (torch.zeros_like(sample),)

    changes = {"random_flip": True, "aspect_ratio": "square", "train_text_encoder": train_text_encoder}
    run = prepare(TrainConfig(**options(tiny_base_xl, photo_folder, tmp_path, **changes)))
    pipeline = run.base.pipeline
    examples = encode_examples(run, CPU)
    model = Objective(run, examples, run.base.family.components | {"unet": Recording()}, CPU, torch.float32)
    model.loss(0, 0, 1)
    ((_, embeds, conditions),) = calls
    expected, pooled = encode_prompts(pipeline, [PROMPT])
    assert torch.allclose(embeds, expected.expand(2, -1, -1), atol=1e-5)
    assert torch.allclose(conditions["text_embeds"], pooled.expand(2, -1), atol=1e-5)
    sizes = {photo.size[::-1] for photo in run.photos}
    for height, width, top, left, own_height, own_width in conditions["time_ids"].tolist():
        assert (height, width) in sizes and (own_height, own_width) == (16, 16)
        assert 0 <= top <= 16 * max(height / width - 1, 0) and 0 <= left <= 16 * max(width / height - 1, 0)


def test_the_layer_that_sdxl_does_not_read_is_not_trained(tiny_base_xl, photo_folder, tmp_path):
    run = prepare(TrainConfig(**options(tiny_base_xl, photo_folder, tmp_path, train_text_encoder=True)))
    assert len(run.targets["text_encoder"]) == 4 and len(run.targets["text_encoder_2"]) == 8
    assert not any(".layers.1." in name for name in run.targets["text_encoder"])


def test_the_autoencoder_of_sdxl_stays_precise(tiny_base_xl, tmp_path):
    """One whose activations leave float16's range, as those of the published weights do."""
    pipeline = tiny_sdxl_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(1e6)  # a norm follows: only the range is another
        pipeline.vae.decoder.conv_in.bias.mul_(1e6)
    folder = tmp_path / "large"
    pipeline.save_pretrained(folder)
    half = tiny_sdxl_pipeline().vae
    half.load_state_dict(pipeline.vae.state_dict())
    assert not half.half().decode(torch.randn(1, 4, 8, 8).half()).sample.isfinite().all()
    model = open_for_adapters([], str(folder), device="cpu", dtype=torch.float16)
    assert model.pipeline.vae.dtype == torch.float32 and model.pipeline.unet.dtype == torch.float16
    (picture,) = generate(model, [PROMPT], seed=3, **PICTURE)
    precise = paint(pipeline)
    assert np.asarray(picture.image).std() > 5
    assert np.abs(np.asarray(picture.image) / 255 - precise).mean() < 0.02
    family_of(pipeline).cast(torch.bfloat16)
    assert pipeline.vae.dtype == torch.bfloat16


def test_offloaded_sdxl_paints_the_same_in_half_precision(tiny_base_xl, monkeypatch):
    """There its autoencoder is called apart from the pipeline, see `generation._paint`."""
    model = open_for_adapters([], str(tiny_base_xl), device="cpu", dtype=torch.float16)
    (expected,) = generate(model, [PROMPT], seed=3, **PICTURE)
    called = []
    for owner, name in ((model.pipeline.vae, "decode"), (model.pipeline, "maybe_free_model_hooks")):
        method = getattr(owner, name)
        spy = lambda *args, name=name, method=method, **options: called.append(name) or method(*args, **options)
        monkeypatch.setattr(owner, name, spy)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        offload_sequentially(getattr(model.pipeline, component))
    (picture,) = generate(model, [PROMPT], seed=3, **PICTURE)
    assert np.array_equal(np.asarray(picture.image), np.asarray(expected.image))
    assert called[-2:] == ["decode", "maybe_free_model_hooks"]  # model offload has taken it to the GPU


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_precision(tiny_base_xl, photo_folder, tmp_path, precision):
    changes = {"mixed_precision": precision, "train_text_encoder": True, "gradient_checkpointing": True}
    result = train(TrainConfig(**options(tiny_base_xl, photo_folder, tmp_path, **changes)))
    assert result.base.pipeline.vae.dtype == torch.float32
    assert not any("forward" in vars(module) for module in result.base.family.components.values())
    assert all(shift.isfinite().all() for shift in read_adapter(result.adapter_path).shifts.values())


# ---------------------------------------------------------------- where bases lie


def test_variants_and_half_precision_folders(tmp_path):
    pipeline = tiny_sdxl_pipeline().to(torch.float16)
    pipeline.save_pretrained(tmp_path / "base", variant="fp16")
    with pytest.raises(SVFitError, match="cannot be opened"):
        open_base_model(str(tmp_path / "base"))
    base = open_base_model(str(tmp_path / "base"), variant="fp16")
    assert all(module.dtype == torch.float32 for module in pipeline_components(base.pipeline).values())
    assert same_weights(base.pipeline, pipeline.to(torch.float32))


def test_hub_ids_with_revision(tiny_base_xl, photo_folder, tmp_path):
    """A cache as the hub's library keeps it; the adapter then remembers id and revision, and finds them again."""
    cache = Path(HF_HUB_CACHE) / "models--someone--tiny-xl"
    shutil.copytree(tiny_base_xl, cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "v1.0").write_text("0123abc")
    base = open_base_model("someone/tiny-xl", revision="v1.0", local_files_only=True)
    assert base.name == "someone/tiny-xl@v1.0" and isinstance(base.family, SDXL)
    with pytest.raises(SVFitError, match="someone/tiny-xl cannot be opened"):
        open_base_model("someone/tiny-xl", revision="v2.0", local_files_only=True)
    result = train(TrainConfig(**options("someone/tiny-xl", photo_folder, tmp_path, revision="v1.0")))
    assert read_adapter(result.adapter_path).base_model == "someone/tiny-xl@v1.0"
    assert open_for_adapters([(result.adapter_path, 1.0)], device="cpu").name == "someone/tiny-xl@v1.0"


def test_what_training_fetches_can_be_painted_with(monkeypatch):
    """Training opens no content filter; fetched without it, the base could not be opened for painting offline."""
    cache = Path(HF_HUB_CACHE) / "models--someone--filtered"
    tiny_pipeline("kl").save_pretrained(folder := cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    index = json.loads((folder / "model_index.json").read_text())
    filtered = index | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    (folder / "model_index.json").write_text(json.dumps(filtered))
    asked = []

    def download(name, **given):
        asked.append((name, given))
        raise OSError("no network")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr(StableDiffusionPipeline, "download", lambda *args, **given: str(folder))
    open_base_model("someone/filtered", content_filter=False, local_files_only=True)
    assert not asked
    assert open_base_model("someone/filtered", content_filter=False, revision="main").name == "someone/filtered@main"
    (name, given) = asked[0]
    assert name == "someone/filtered" and given["revision"] == "main" and given["use_safetensors"]
    assert not {"safety_checker", "requires_safety_checker"} & set(given)
    with pytest.raises(SVFitError, match="someone/filtered, which is only partly on this disk, and what a file names"):
        open_named_base("someone/filtered", Path("dog.safetensors"))


@pytest.mark.parametrize("kind", ["v1", "v2", "xl"])
def test_single_files(kind, photo_folder, tmp_path):
    pipeline = {
        "v1": lambda: tiny_pipeline(seed=4),
        "v2": lambda: tiny_pipeline("kl", "v_prediction", seed=5),
        "xl": lambda: tiny_sdxl_pipeline(seed=6),
    }[kind]()
    if kind == "v1":  # most files are in half precision; bases are opened in float32 all the same
        pipeline.to(torch.float16)
    configs = tmp_path / "configs"
    pipeline.save_pretrained(configs)
    for weights in configs.rglob("*.safetensors"):
        weights.unlink()
    path = save_single_file(pipeline, tmp_path / "my model.safetensors", open_clip=kind == "v2")
    pipeline.to(torch.float32)
    base = open_base_model(str(path), base_config=str(configs))
    assert base.name == "my model" and same_weights(base.pipeline, pipeline)
    assert base.family.noising().prediction_type == pipeline.scheduler.config.prediction_type
    assert np.array_equal(paint(base.pipeline), paint(pipeline))
    changes = {"base_config": str(configs), "train_text_encoder": True}
    result = train(TrainConfig(**options(path, photo_folder, tmp_path / "run", **changes)))
    load_adapter(pipeline, result.adapter_path)  # the same base, whatever it was opened from
    model = open_for_adapters([(result.adapter_path, 1.0)], str(path), device="cpu", base_config=str(configs))
    (picture,) = generate(model, [PROMPT], seed=3, **PICTURE)
    assert np.abs(np.asarray(picture.image) / 255 - paint(pipeline)).max() < 2 / 255


@pytest.mark.parametrize("said", ["entry", "metadata"])
def test_single_files_that_say_that_they_predict_v(said, tmp_path):
    pipeline = tiny_sdxl_pipeline()
    pipeline.save_pretrained(tmp_path / "configs")
    extra = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)} if said == "entry" else None
    metadata = {"modelspec.prediction_type": "v"} if said == "metadata" else None
    path = save_single_file(pipeline, tmp_path / "v.safetensors", extra=extra, metadata=metadata)
    base = open_base_model(str(path), base_config=str(tmp_path / "configs"))
    schedule = base.family.noising().scheduler
    assert schedule.config.prediction_type == base.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert (schedule.alphas_cumprod[-1] == 0) == (said == "entry")


def test_single_files_that_are_something_else(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0 no header")
    with pytest.raises(SVFitError, match="is no whole safetensors file"):
        open_base_model(str(path))
    pipeline = tiny_pipeline()
    save_single_file(pipeline, path, extra={"conditioner.embedders.0.model.ln_final.bias": torch.zeros(2)})
    with pytest.raises(SVFitError, match="is the SDXL refiner"):
        open_base_model(str(path))
    pipeline.unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(SVFitError, match="is no Stable Diffusion checkpoint"):
        open_base_model(str(tmp_path / "unet" / "diffusion_pytorch_model.safetensors"))
    save_single_file(pipeline, path)
    tiny_sdxl_pipeline().save_config(tmp_path / "xl")
    with pytest.raises(SVFitError, match="for StableDiffusionPipeline, but base_config .* StableDiffusionXLPipeline"):
        open_base_model(str(path), base_config=str(tmp_path / "xl"))
    with pytest.raises(SVFitError, match="base_config names a folder with them"):
        open_base_model(str(path), local_files_only=True)


def test_bases_of_another_kind_are_refused(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "edm")
    scheduler = tmp_path / "edm" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "EDMEulerScheduler"}))
    index = tmp_path / "edm" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", "EDMEulerScheduler"]}))
    with pytest.raises(SVFitError, match="sampled with EDMEulerScheduler"):
        open_base_model(str(tmp_path / "edm")).family.noising()
    shutil.copytree(tiny_base, tmp_path / "inpaint")
    config = tmp_path / "inpaint" / "unet" / "config.json"
    unet = type(tiny_pipeline().unet).from_config({**json.loads(config.read_text()), "in_channels": 9})
    unet.save_pretrained(tmp_path / "inpaint" / "unet")
    with pytest.raises(SVFitError, match="takes 9 channels, as inpainting models do"):
        open_base_model(str(tmp_path / "inpaint"))
