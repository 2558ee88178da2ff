"""Prior preservation: where class pictures come from, which are used, and what their loss does."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_objective import CPU, Constant, denoiser

from svfit_dreambooth import TrainConfig, read_adapter, train
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.painting.picture import Picture
from svfit_dreambooth.training import class_pictures
from svfit_dreambooth.training.class_pictures import NOTE, paint_class_pictures, usable_class_pictures
from svfit_dreambooth.training.examples import encode_examples
from svfit_dreambooth.training.plan import prepare

OPTIONS = {"height": 16, "width": 16, "num_inference_steps": 1, "seed": 5}


@pytest.fixture
def base(tiny_base):
    return open_base_model(str(tiny_base), content_filter=False)


@pytest.fixture
def config(tiny_options, tmp_path):
    return tiny_options | {
        "class_prompt": "a photo of a dog",
        "with_prior_preservation": True,
        "class_data_dir": str(tmp_path / "class"),
        "num_class_images": 3,
        "output_dir": str(tmp_path / "out"),
        "max_train_steps": 2,
        "num_inference_steps": 1,
        "fixed_loss_examples": 0,
    }


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.png")}


def save_noise(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)


def test_painted_once_kept_and_topped_up(base, tmp_path):
    first = paint_class_pictures(tmp_path / "class", base, "a dog", 2, **OPTIONS)
    kept = content(tmp_path / "class")
    assert [photo.path.name for photo in first] == ["class-000005.png", "class-000006.png"] == sorted(kept)
    note = json.loads((tmp_path / "class" / NOTE).read_text())
    assert note["class_prompt"] == "a dog" and note["base_model"] == "tiny-kl" and note["next_seed"] == 7
    (picture,) = generate(base, ["a dog"], seed=6, height=16, width=16, num_inference_steps=1)
    assert np.array_equal(np.asarray(picture.image), np.asarray(Image.open(first[1].path)))
    assert len(paint_class_pictures(tmp_path / "class", base, "a dog", 3, **OPTIONS)) == 3
    more = content(tmp_path / "class")
    assert kept.items() <= more.items() and len(more) == 3
    assert [p.path for p in paint_class_pictures(tmp_path / "class", base, "a dog", 2, **OPTIONS)] == [
        p.path for p in first
    ]
    assert content(tmp_path / "class") == more


def test_a_deleted_picture_does_not_come_back(base, tmp_path):
    first = paint_class_pictures(tmp_path, base, "a dog", 2, **OPTIONS)
    first[0].path.unlink()
    again = paint_class_pictures(tmp_path, base, "a dog", 2, **OPTIONS)
    assert [photo.path.name for photo in again] == ["class-000006.png", "class-000007.png"]


def test_blacked_out_and_failed_pictures_are_never_used(base, tmp_path, monkeypatch, caplog):
    def failing(model, prompts, *, seed, **options):
        (picture,) = generate(model, prompts, seed=seed, **options)
        if seed == 5:  # what a content filter does
            picture.image, picture.filtered = Image.new("RGB", (16, 16)), True
        if seed == 6:  # what NaN turns into
            picture.image = Image.new("RGB", (16, 16))
        return [picture]

    save_noise(tmp_path / "own.png")
    Image.new("RGB", (20, 20), (3, 2, 0)).save(tmp_path / "own_black.png")
    monkeypatch.setattr(class_pictures, "generate", failing)
    found = paint_class_pictures(tmp_path, base, "a dog", 3, **OPTIONS)
    assert [photo.path.name for photo in found] == ["class-000007.png", "class-000008.png", "own.png"]
    assert "own_black.png shows nothing" in caplog.text
    assert json.loads((tmp_path / NOTE).read_text())["unusable_seeds"] == [5, 6]
    monkeypatch.setattr(
        class_pictures, "generate", lambda *args, **kwargs: [Picture(Image.new("RGB", (16, 16)), {}, True)]
    )
    with pytest.raises(SVFitError, match="10 pictures of 'a dog' in a row came out blacked out"):
        paint_class_pictures(tmp_path, base, "a dog", 4, **OPTIONS)


@pytest.mark.parametrize("xl", [False, True])
def test_a_run_of_less_precision_paints_with_a_unet_of_its_own_type(config, tiny_base_xl, monkeypatch, xl):
    """And leaves its mark by the stored weights: a run in float32 uses the same pictures."""
    config |= {"pretrained_model_name_or_path": str(tiny_base_xl)} if xl else {}
    seen = []

    def note(model, prompts, **options):
        pipeline = model.pipeline
        seen.append((pipeline.unet.dtype, pipeline.text_encoder.dtype, pipeline.vae.dtype))
        return generate(model, prompts, **options)

    monkeypatch.setattr(class_pictures, "generate", note)
    run = prepare(TrainConfig(**config, mixed_precision="bf16"))
    weights = run.weights()
    exact = {name: weight.clone() for name, weight in weights.items()}
    encode_examples(run, CPU)
    assert seen == [(torch.bfloat16, torch.float32, torch.float32)] * 3 and "forward" not in vars(
        run.base.pipeline.unet
    )
    assert all(torch.equal(weight, exact[name]) for name, weight in weights.items())  # directions come from them
    again = prepare(TrainConfig(**config))
    assert len(encode_examples(again, CPU).prior.mean) == 3 and len(seen) == 3
    assert again.base.pipeline.unet.dtype == torch.float32


def test_interrupted_painting_ends_at_the_same_pictures(base, tmp_path, monkeypatch):
    def interrupted(model, prompts, *, seed, **options):
        if seed == 6:
            raise KeyboardInterrupt
        return generate(model, prompts, seed=seed, **options)

    monkeypatch.setattr(class_pictures, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        paint_class_pictures(tmp_path / "a", base, "a dog", 3, **OPTIONS)
    monkeypatch.undo()
    paint_class_pictures(tmp_path / "a", base, "a dog", 3, **OPTIONS)
    paint_class_pictures(tmp_path / "b", base, "a dog", 3, **OPTIONS)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_pictures_of_something_else_are_refused(config, base, tiny_base_v, tmp_path):
    train(TrainConfig(**config))
    before = content(config["class_data_dir"])
    with pytest.raises(SVFitError, match="holds pictures painted of 'a photo of a dog'"):
        prepare(TrainConfig(**{**config, "class_prompt": "a cat"}))
    with pytest.raises(SVFitError, match="painted by another base, tiny-kl"):
        prepare(TrainConfig(**{**config, "pretrained_model_name_or_path": str(tiny_base_v)}))
    assert content(config["class_data_dir"]) == before
    (Path(config["class_data_dir"]) / NOTE).write_text("{}")
    with pytest.raises(SVFitError, match="cannot be read: delete it"):
        prepare(TrainConfig(**config))


def test_a_run_goes_on_with_its_own_class_pictures_alone(config):
    options = {**config, "checkpointing_steps": 1}
    first = train(TrainConfig(**options), on_step=lambda step: step.step == 1)
    assert first.stopped and train(TrainConfig(**options, resume_from_checkpoint="latest")).steps > 1
    one, *_ = usable_class_pictures(Path(config["class_data_dir"]))
    one.path.unlink()
    with pytest.raises(SVFitError, match="belongs to other class pictures"):
        train(TrainConfig(**options, resume_from_checkpoint="latest"))


def test_the_prior_loss_is_split_off_and_weighs_as_asked():
    model = denoiser(Constant(0.5), prior_loss_weight=0.3)
    model.examples.prior = denoiser(sizes=((8, 8),) * 5).examples
    parts = model.loss(2, 0, 1)
    errors = {
        purpose: torch.stack([(0.5 - model.draw(n, purpose).noise).square().mean() for n in range(8, 12)]).mean()
        for purpose in ("train", "class")
    }
    assert torch.allclose(parts.instance, errors["train"]) and torch.allclose(parts.prior, errors["class"])
    assert torch.allclose(parts.total, errors["train"] + 0.3 * errors["class"])
    alone = denoiser(Constant(0.5)).loss(2, 0, 1)
    assert alone.prior is None and torch.equal(alone.total, alone.instance)
    assert torch.equal(alone.instance, parts.instance)  # photos are drawn as without class pictures


def test_class_pictures_carry_their_own_prompt(config):
    run = prepare(TrainConfig(**config))
    save_noise(Path(config["class_data_dir"]) / "a.png")
    (Path(config["class_data_dir"]) / "a.txt").write_text("a dog in the snow")
    examples = encode_examples(run, CPU)
    assert len(examples.mean) == 3 and len(examples.prior.mean) == 3
    assert examples.prior.prompts == [[0], [1], [1]] and len(examples.prior.conditions["prompt_embeds"]) == 2
    assert not torch.equal(examples.prior.conditions["prompt_embeds"][0], examples.prior.conditions["prompt_embeds"][1])
    assert not torch.equal(examples.prior.conditions["prompt_embeds"][1], examples.conditions["prompt_embeds"][0])


@pytest.mark.parametrize("text_encoder", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_runs_repeat_and_the_file_names_the_class(config, tmp_path, text_encoder):
    config |= {"train_text_encoder": text_encoder}
    first = train(TrainConfig(**config))
    again = train(TrainConfig(**{**config, "output_dir": str(tmp_path / "again")}))
    shifts, others = read_adapter(first.adapter_path).shifts, read_adapter(again.adapter_path).shifts
    assert all(torch.equal(shifts[name], others[name]) for name in shifts)
    assert read_adapter(first.adapter_path).class_prompt == "a photo of a dog"
    alone = train(TrainConfig(**{**config, "output_dir": str(tmp_path / "alone"), "with_prior_preservation": False}))
    others = read_adapter(alone.adapter_path).shifts
    assert not all(torch.equal(shifts[name], others[name]) for name in shifts)


def test_what_is_missing_is_said_before_anything_slow(config, tmp_path):
    run = prepare(TrainConfig(**{**config, "class_data_dir": None, "dry_run": True}))
    assert run.config.class_data_dir == str(tmp_path / "out" / "class_pictures")
    assert any("class pictures: 0 of 3" in line and "the base paints" in line for line in run.report())
    assert usable_class_pictures(tmp_path / "class") == []
    with pytest.raises(SVFitError, match="class_prompt is missing"):
        prepare(TrainConfig(**{**config, "class_prompt": None}))
    with pytest.raises(SVFitError, match="is the folder of the photos"):
        prepare(TrainConfig(**{**config, "class_data_dir": config["instance_data_dir"]}))
    with pytest.raises(SVFitError, match="prior_loss_weight is 0"):
        TrainConfig(prior_loss_weight=0)
