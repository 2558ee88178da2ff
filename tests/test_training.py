"""The main job on tiny pipelines: photos to adapter, and the adapter opened again through the public loader."""

import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from svfit_dreambooth import TrainConfig, load_adapter, read_adapter, train
from svfit_dreambooth.commands.arguments import parse_config
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.training.definite import _check_writable
from svfit_dreambooth.training.estimate import estimate_memory
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.plan import Plan, prepare


@pytest.fixture
def config(tiny_options):
    return tiny_options | {
        "max_train_steps": 6,
        "fixed_loss_examples": 4,
        "learning_rate": 5e-2,
        "validation_steps": 0,
    }


def same_shifts(first, second):
    a, b = read_adapter(first).shifts, read_adapter(second).shifts
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_photos_to_adapter(config):
    steps = []
    result = train(TrainConfig(**{**config, "max_train_steps": 60}), on_step=lambda step: steps.append(step))
    assert [step.step for step in steps] == list(range(1, 61)) and result.steps == 60 and not result.stopped
    assert result.loss_after < 0.95 * result.loss_before
    assert result.adapter_path.name == "my-dog.safetensors" and result.file_bytes < 20_000
    adapter = read_adapter(result.adapter_path)
    assert result.values == sum(adapter.ranks.values()) == 624
    assert adapter.components == ["unet"] and adapter.base_model == "tiny-kl"
    assert adapter.instance_prompt == "a photo of sks dog"
    assert str(config["output_dir"]) not in json.dumps(adapter.metadata)
    pipeline = result.base.pipeline
    assert not svfit_layers(pipeline.unet)
    load_adapter(pipeline, result.adapter_path)
    assert len(svfit_layers(pipeline.unet)) == 32
    resolved = parse_config(["--config", f"{config['output_dir']}/config.yaml"], prog="train")
    assert resolved.resolution == 16 and resolved.adapter_name == "my-dog"


def test_the_seed_fixes_everything(config, tmp_path):
    paths = [
        train(TrainConfig(**{**config, "output_dir": str(tmp_path / name), "seed": seed})).adapter_path
        for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    ]
    assert same_shifts(paths[0], paths[1]) and not same_shifts(paths[0], paths[2])


def test_accumulated_batches_equal_one_large_batch(config, tmp_path):
    options = {**config, "adam_epsilon": 1e-3, "save_dtype": "float32", "max_grad_norm": 1e9}
    large = train(TrainConfig(**{**options, "train_batch_size": 4, "output_dir": str(tmp_path / "a")}))
    small = train(
        TrainConfig(
            **{**options, "train_batch_size": 2, "gradient_accumulation_steps": 2, "output_dir": str(tmp_path / "b")}
        )
    )
    first, second = read_adapter(large.adapter_path).shifts, read_adapter(small.adapter_path).shifts
    assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5) for name in first)


def test_text_encoder_v_prediction_and_checkpointing(config, tiny_base_v):
    options = {**config, "pretrained_model_name_or_path": str(tiny_base_v), "train_text_encoder": True}
    result = train(TrainConfig(**options, gradient_checkpointing=True, text_encoder_lr=0.05))
    adapter = read_adapter(result.adapter_path)
    assert adapter.components == ["text_encoder", "unet"]
    assert all(shift.any() for name, shift in adapter.shifts.items() if name.startswith("text_encoder"))


def test_gradient_checkpointing_does_not_change_the_result(config, tmp_path):
    paths = [
        train(
            TrainConfig(
                **{**config, "output_dir": str(tmp_path / str(flag))},
                gradient_checkpointing=flag,
                train_text_encoder=True,
                save_dtype="float32",
            )
        ).adapter_path
        for flag in (False, True)
    ]
    first, second = (read_adapter(path).shifts for path in paths)
    assert all(torch.allclose(first[name], second[name], atol=1e-3) for name in first)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(config, precision):
    result = train(TrainConfig(**config, mixed_precision=precision, train_text_encoder=True))
    assert result.base.pipeline.unet.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    shifts = read_adapter(result.adapter_path).shifts
    assert all(torch.isfinite(shift).all() for shift in shifts.values()) and any(s.any() for s in shifts.values())


@pytest.mark.parametrize("options", [{}, {"budget": 25}])
def test_the_stored_weights_are_not_kept_beside_the_cast_ones(config, options, monkeypatch):
    stored, alive, original = [], [], Plan.weights

    def note(plan):
        weights = original(plan)
        stored.extend(weakref.ref(weight) for weight in weights.values())
        return weights

    monkeypatch.setattr(Plan, "weights", note)

    def count(step):
        alive.append(sum(reference() is not None for reference in stored))
        return True

    result = train(TrainConfig(**config, **options, mixed_precision="bf16"), on_step=count)
    assert stored and alive == [0]
    assert result.plan.report() and estimate_memory(result.plan).bases > 0  # which need shapes alone


@pytest.mark.parametrize(("options", "rank"), [({"rank": 5}, {5}), ({"rank": 999}, {16, 24, 32})])
def test_ranks_are_capped_by_the_layer(config, options, rank):
    result = train(TrainConfig(**config, **options))
    assert set(read_adapter(result.adapter_path).ranks.values()) == rank


def test_energy_gives_every_layer_its_own_rank(config):
    ranks = read_adapter(train(TrainConfig(**config, energy=0.5)).adapter_path).ranks
    assert len(set(ranks.values())) > 1 and max(ranks.values()) < 32


def test_target_modules(config):
    result = train(TrainConfig(**config, target_modules=["attn2.to_k", "attn2.to_v"]))
    assert {name.rsplit(".", 2)[1:][0] for name in read_adapter(result.adapter_path).shifts} == {"attn2"}


def test_on_step_stops_cleanly(config):
    result = train(TrainConfig(**config), on_step=lambda step: step.step == 2)
    assert result.stopped and result.steps == 2 and "stopped early" in result.summary()
    assert any(shift.any() for shift in read_adapter(result.adapter_path).shifts.values())


def test_ctrl_c_saves_what_was_learnt(config):
    def interrupt(step):
        if step.step == 3:
            raise KeyboardInterrupt

    result = train(TrainConfig(**config), on_step=interrupt)
    assert result.stopped and result.steps == 3 and result.adapter_path.is_file()


def test_init_adapter_continues(config, tmp_path):
    first = train(TrainConfig(**config))
    options = {**config, "output_dir": str(tmp_path / "second"), "init_adapter": str(first.adapter_path)}
    second = train(TrainConfig(**{**options, "learning_rate": 1e-9}))
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-3)
    assert same_shifts(first.adapter_path, second.adapter_path)
    with pytest.raises(SVFitError, match="which this run does not train"):
        train(TrainConfig(**{**options, "target_modules": ["to_q"]}))


def test_init_adapter_with_more_values_than_the_run_keeps(config, tmp_path):
    first = train(TrainConfig(**config, energy=0.5))
    longest = max(read_adapter(first.adapter_path).ranks.values())
    options = {**config, "output_dir": str(tmp_path / "second"), "init_adapter": str(first.adapter_path)}
    assert prepare(TrainConfig(**options, energy=0.5)) and prepare(TrainConfig(**options, rank=longest))
    with pytest.raises(SVFitError, match=f"rank 2 keeps fewer .* than the {longest} .* leave rank out, or use"):
        prepare(TrainConfig(**options, rank=2))
    with pytest.raises(SVFitError, match=r"energy 0.4 may keep fewer .* leave it out"):
        prepare(TrainConfig(**options, energy=0.4))
    plain = train(TrainConfig(**{**config, "output_dir": str(tmp_path / "plain")}))
    with pytest.raises(SVFitError, match="not made with an energy up to that"):
        prepare(TrainConfig(**{**options, "init_adapter": str(plain.adapter_path)}, energy=0.99))


def test_init_adapter_that_the_run_replaces(config):
    first = train(TrainConfig(**config))
    again = TrainConfig(**{**config, "init_adapter": str(first.adapter_path), "learning_rate": 1e-9})
    second = train(again)
    assert second.adapter_path == first.adapter_path
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-3)
    assert same_shifts(first.adapter_path.parent / "earlier" / "001" / "my-dog.safetensors", second.adapter_path)


def test_starting_anew_replaces_no_adapter(config):
    folder = Path(config["output_dir"])
    folder.mkdir()
    (folder / "my-dog.safetensors").write_text("another's")
    train(TrainConfig(**config, resume_from_checkpoint="latest"))
    assert (folder / "earlier" / "001" / "my-dog.safetensors").read_text() == "another's"


def test_an_output_that_would_replace_what_the_run_reads(config, photo_folder, tmp_path):
    with pytest.raises(SVFitError, match="is the folder of the photos: name another"):
        prepare(TrainConfig(**{**config, "output_dir": f"{photo_folder}/."}))
    (tmp_path / "my-dog.safetensors").write_bytes(b"weights")
    base = {"pretrained_model_name_or_path": str(tmp_path / "my-dog.safetensors"), "output_dir": str(tmp_path)}
    with pytest.raises(SVFitError, match="the adapter would replace its base model"):
        prepare(TrainConfig(**{**config, **base}))


def test_init_adapter_of_another_base_is_refused(config, tiny_base_v, tmp_path):
    first = train(TrainConfig(**config))
    options = {**config, "pretrained_model_name_or_path": str(tiny_base_v), "output_dir": str(tmp_path / "second")}
    with pytest.raises(SVFitError, match="was trained on another base model, tiny-kl"):
        train(TrainConfig(**options, init_adapter=str(first.adapter_path)))


def test_captions_take_the_place_of_the_prompt(config, photo_folder, tmp_path):
    folder = tmp_path / "captioned"
    folder.mkdir()
    for photo in photo_folder.glob("*.png"):
        (folder / photo.name).write_bytes(photo.read_bytes())
        (folder / photo.name).with_suffix(".txt").write_text("sks dog in the snow")
    options = {**config, "instance_data_dir": str(folder), "instance_prompt": None}
    assert train(TrainConfig(**options)).steps == 6
    next(folder.glob("*.txt")).unlink()
    with pytest.raises(SVFitError, match="instance_prompt is missing"):
        train(TrainConfig(**options))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"instance_data_dir": "/no/such/folder"}, "There is no folder '/no/such/folder'"),
        ({"instance_data_dir": None}, "instance_data_dir is missing"),
        ({"instance_prompt": None}, "instance_prompt is missing"),
        ({"resolution": 17}, "resolution 17 is not a multiple of 2.*use 16"),
        ({"lr_scheduler": "zigzag"}, "lr_scheduler is 'zigzag', but must be linear, cosine"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler is 'piecewise_constant', but must be linear"),
        ({"pretrained_model_name_or_path": "/no/model"}, "/no/model is no base model"),
        ({"pretrained_model_name_or_path": "model.ckpt"}, "model.ckpt is no base model"),
        ({"target_modules": ["to_z"]}, "'to_z' matches no linear layer"),
        ({"init_adapter": "/no/adapter"}, "init_adapter /no/adapter does not exist"),
        ({"adapter_name": "../escape"}, "'../escape' is no file name"),
        ({"dino_path": "/no/dino", "validation_steps": 2}, "the weights /no/dino cannot be opened as a AutoModel"),
        ({"clip_path": "/no/clip", "validation_steps": None}, "the weights /no/clip cannot be opened as a CLIPModel"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_slow(config, changes, sentence, monkeypatch):
    monkeypatch.setattr("svfit_dreambooth.training.run.begin", None)  # never reached
    with pytest.raises(SVFitError, match=sentence) as error:
        train(TrainConfig(**{**config, **changes}))
    assert "\n" not in str(error.value)


def test_a_dry_run_trains_nothing(config, tmp_path):
    with pytest.raises(SVFitError, match="dry_run asks for no training"):
        train(TrainConfig(**config, dry_run=True))
    assert not (tmp_path / "the run").exists()


def test_base_folders_that_are_none(config, tmp_path):
    with pytest.raises(SVFitError, match="is not a diffusers model folder"):
        train(TrainConfig(**{**config, "pretrained_model_name_or_path": str(tmp_path)}))
    (tmp_path / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(SVFitError, match="is a KandinskyPipeline"):
        train(TrainConfig(**{**config, "pretrained_model_name_or_path": str(tmp_path)}))
    (tmp_path / "model.ckpt").write_bytes(b"\x80")
    with pytest.raises(SVFitError, match="pickled files are never opened"):
        train(TrainConfig(**{**config, "pretrained_model_name_or_path": str(tmp_path / "model.ckpt")}))


def test_a_base_that_predicts_pictures_is_refused_before_anything_slow(config, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    scheduler = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "sample"}))
    with pytest.raises(SVFitError, match="the base predicts 'sample'"):
        prepare(TrainConfig(**{**config, "pretrained_model_name_or_path": str(tmp_path / "base")}))


def test_a_folder_of_text_files_and_an_empty_one(config, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(SVFitError, match="holds nothing"):
        train(TrainConfig(**{**config, "instance_data_dir": str(folder)}))
    (folder / "notes.txt").write_text("no picture")
    with pytest.raises(SVFitError, match="no usable photo"):
        train(TrainConfig(**{**config, "instance_data_dir": str(folder)}))


def test_an_output_that_cannot_be_written(config, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SVFitError, match="output_dir .* cannot be written"):
        train(TrainConfig(**{**config, "output_dir": str(tmp_path / "file" / "run")}))


def test_processes_that_ask_at_once_whether_the_output_can_be_written(tmp_path, monkeypatch):
    def busy(path, *args, **kwargs):  # another process was faster
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "unlink", busy)
    _check_writable(str(tmp_path / "run"))
    assert not list((tmp_path / "run").iterdir())


def test_sequence_of_examples_covers_the_photos(config):
    result = train(TrainConfig(**config))
    run = result.plan
    from svfit_dreambooth.training.examples import encode_examples

    examples = encode_examples(run, torch.device("cpu"))
    model = Objective(run, examples, run.base.family.components, torch.device("cpu"), torch.float32)
    photos = [model.draw(number).index for number in range(9)]
    assert all(sorted(photos[i : i + 3]) == [0, 1, 2] for i in (0, 3, 6))
    again, other = model.draw(4), model.draw(5)
    assert torch.equal(model.draw(4).latents, again.latents) and torch.equal(model.draw(4).noise, again.noise)
    assert not torch.equal(again.noise, other.noise)
