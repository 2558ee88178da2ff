"""What happens between the steps: bad numbers, signals, full disks, deleted photos, looks, trackers."""

import json
import math
import os
import shutil
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svfit_dreambooth import TrainConfig, read_adapter, train
from svfit_dreambooth.bases.families import pipeline_components
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.sharing.export import export_lora
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.loop import Loop
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.plan import open_run_base, prepare
from svfit_dreambooth.training.stepping import MAX_SKIPPED


@pytest.fixture
def config(tiny_options):
    return tiny_options | {
        "max_train_steps": 8,
        "learning_rate": 0.05,
        "fixed_loss_examples": 2,
        "checkpointing_steps": 2,
        "validation_steps": 0,
    }


def spoil(monkeypatch, step, times):
    """Makes the loss NaN the first `times` times that micro-batch `step` - 1 comes."""
    original, seen = Objective.loss, []

    def loss(self, number, *args):
        parts = original(self, number, *args)
        if number != step - 1 or len(seen) >= times:
            return parts
        seen.append(number)
        return parts._replace(total=parts.total * math.nan)

    monkeypatch.setattr(Objective, "loss", loss)


class Explode(torch.autograd.Function):
    """The same, with an infinite gradient."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def events(config, kind):
    return [event for event in RunFolder(config["output_dir"]).events() if event.name == kind]


def test_a_passing_nan_rolls_back_to_the_last_checkpoint_with_half_the_rate(config, monkeypatch):
    spoil(monkeypatch, step=6, times=1)
    result = train(TrainConfig(**config, lr_scheduler="constant"))
    assert result.steps == 8 and not result.stopped
    (event,) = events(config, "rollback")
    assert event.step == 4 and event.reason == "the loss is nan at step 6"
    rates = [step.learning_rate for step in events(config, "step")]
    assert [step.step for step in events(config, "step")] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert rates == pytest.approx([0.05] * 5 + [0.025] * 4)


def test_a_rollback_leaves_no_gradient_of_the_step_it_gave_up(config, monkeypatch):
    spoil(monkeypatch, step=5, times=1)  # the second of three micro-batches of step 2: the first has left gradients
    seen, roll_back = [], Loop.roll_back

    def note(self, reason):
        before = [value.grad is not None for value in self.values.values()]
        roll_back(self, reason)
        seen.append((all(before), [value.grad for value in self.values.values() if value.grad is not None]))

    monkeypatch.setattr(Loop, "roll_back", note)
    train(TrainConfig(**{**config, "max_train_steps": 2}, gradient_accumulation_steps=3))
    assert seen == [(True, [])]


def test_a_lasting_nan_stops_after_three_returns_and_saves_the_last_good_state(config, monkeypatch, tmp_path):
    spoil(monkeypatch, step=6, times=99)
    with pytest.raises(SVFitError, match="the loss is nan at step 6, also after 3 returns to step 4") as error:
        train(TrainConfig(**config))
    assert len(events(config, "rollback")) == 3 and events(config, "end")[0].status == "failed"
    monkeypatch.undo()
    saved = read_adapter(Path(config["output_dir"]) / "my-dog.safetensors").shifts
    other = {**config, "output_dir": str(tmp_path / "other")}
    shorter = train(TrainConfig(**other), on_step=lambda step: step.step == 4)
    assert "step 4 is saved in" in str(error.value)
    assert all(torch.equal(shift, saved[name]) for name, shift in read_adapter(shorter.adapter_path).shifts.items())


def test_nan_from_the_first_step_saves_nothing(config, monkeypatch):
    spoil(monkeypatch, step=1, times=99)
    with pytest.raises(SVFitError, match="the loss is nan at step 1"):
        train(TrainConfig(**config))
    assert not list(Path(config["output_dir"]).glob("*.safetensors"))


def test_an_infinite_gradient_under_a_finite_loss_is_noticed(config, monkeypatch):
    original = Objective.loss

    def loss(self, number, *args):
        parts = original(self, number, *args)
        return parts._replace(total=Explode.apply(parts.total)) if number == 2 else parts

    monkeypatch.setattr(Objective, "loss", loss)
    with pytest.raises(SVFitError, match="the gradient's length is (nan|inf) at step 3"):
        train(TrainConfig(**config))


def test_gradients_that_are_never_finite_end_a_run_in_fp16(config, monkeypatch):
    """Loss scaling, which accelerate arranges on GPUs alone, skips such steps, and goes on skipping them."""
    from svfit_dreambooth.training import processes as module

    original, accelerator = Objective.loss, module.make_accelerator

    def scaling(config):
        made = accelerator(config)
        made.scaler = torch.amp.GradScaler("cpu")
        return made

    monkeypatch.setattr(module, "make_accelerator", scaling)

    def loss(self, number, *args):
        parts = original(self, number, *args)
        return parts._replace(total=Explode.apply(parts.total)) if number >= 3 else parts

    monkeypatch.setattr(Objective, "loss", loss)
    options = {**config, "max_train_steps": 60, "lr_scheduler": "constant"}
    with pytest.raises(
        SVFitError, match=f"gradients of {MAX_SKIPPED} steps in a row, up to step {3 + MAX_SKIPPED}, are not"
    ):
        train(TrainConfig(**options, mixed_precision="fp16"))
    assert events(config, "end")[0].status == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_after_the_step_and_it_can_go_on(config, number, tmp_path):
    def interrupt(step):
        if step.step == 3:
            os.kill(os.getpid(), number)

    outside = signal.signal(number, signal.default_int_handler)  # started in the background, the tests may ignore it
    try:
        result = train(TrainConfig(**config), on_step=interrupt)
        assert signal.getsignal(number) == signal.default_int_handler
    finally:
        signal.signal(number, outside)
    assert result.stopped and 3 <= result.steps <= 4 and "resume_from_checkpoint latest" in result.summary()
    assert events(config, "end")[0].status == "stopped"
    resumed = train(TrainConfig(**config, resume_from_checkpoint="latest"))
    whole = train(TrainConfig(**{**config, "output_dir": str(tmp_path / "whole")}))
    first, second = read_adapter(resumed.adapter_path).shifts, read_adapter(whole.adapter_path).shifts
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_signal_during_the_last_step_leaves_out_what_takes_long(config, caplog):
    def interrupt(step):
        if step.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(TrainConfig(**{**config, "final_pictures": True}), on_step=interrupt)
    assert not result.stopped and result.showing is None and "pictures and LoRA are left out" in caplog.text
    assert events(config, "end")[0].status == "finished" and read_adapter(result.adapter_path).shifts


def test_a_signal_before_the_first_step_is_noted(config, monkeypatch):
    def paint(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("svfit_dreambooth.training.run.encode_examples", paint)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**config))
    assert events(config, "end")[0].status == "stopped"


def test_the_environment_of_accelerate_changes_nothing_in_silence(config, monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    result = train(TrainConfig(**{**config, "max_train_steps": 2}))
    assert all(shift.any() for shift in read_adapter(result.adapter_path).shifts.values())
    assert result.base.pipeline.unet.dtype == torch.float32
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SVFitError, match="ACCELERATE_USE_FSDP is set.*unset it"):
        train(TrainConfig(**config))


def test_a_second_interrupt_in_the_middle_of_a_step_keeps_the_last_good_state(config, monkeypatch):
    original = Objective.loss

    def loss(self, number, *args):
        if number == 4:
            raise KeyboardInterrupt
        return original(self, number, *args)

    monkeypatch.setattr(Objective, "loss", loss)
    result = train(TrainConfig(**config))
    assert result.stopped and result.steps == 4 and result.adapter_path.is_file()


def test_values_of_one_rate_are_one_group_of_the_optimizer(config, monkeypatch):
    run, seen = Loop.run, []

    def note(self, *args):
        seen.extend((group["peak"], len(group["params"])) for group in self.optimizer.inner.param_groups)
        return run(self, *args)

    monkeypatch.setattr(Loop, "run", note)
    options = {**config, "max_train_steps": 1, "learning_rate": 0.05, "text_encoder_lr": 0.01, "learned_word_lr": 0.05}
    train(TrainConfig(**options, train_text_encoder=True, learned_word="sks"))
    assert seen == [(0.05, 32 + 1), (0.01, 8)]


def test_training_in_a_thread_leaves_signals_alone(config):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(TrainConfig(**{**config, "max_train_steps": 1}))))
    thread.start()
    thread.join()
    assert results[0].steps == 1


def fill_disk_at(monkeypatch, module, function, name):
    """`function` of `module` finds the disk full where it writes the file `name`."""
    original = getattr(module, function)

    def full(*arguments):
        path = next(argument for argument in arguments if isinstance(argument, Path))
        if path.name == name:
            raise SVFitError(f"'{path}' can't be written (No space left on device): choose another place.")
        return original(*arguments)

    monkeypatch.setattr(module, function, full)


def test_a_full_disk_costs_a_checkpoint_but_not_the_run(config, monkeypatch, caplog):
    from svfit_dreambooth.training import checkpoints

    fill_disk_at(monkeypatch, checkpoints, "write_atomically", "step-000004.safetensors")
    result = train(TrainConfig(**config))
    assert result.steps == 8 and "no checkpoint of step 4" in caplog.text
    names = [path.name for path in sorted((Path(config["output_dir"]) / "checkpoints").iterdir())]
    assert names == ["step-000002.safetensors", "step-000006.safetensors", "step-000008.safetensors"]


def test_a_disk_that_is_full_at_the_end_is_made_room_on_or_another_is_found(config, monkeypatch, caplog, tmp_path):
    from svfit_dreambooth.files import NotWritten
    from svfit_dreambooth.training import result as outcome

    original, room = outcome.save_adapter, {"after": 1}

    def full(adapter, path, dtype):
        if path.parent == Path(config["output_dir"]) and room["after"]:
            room["after"] -= 1
            raise NotWritten(f"'{path}' can't be written (No space left on device): choose another place.")
        return original(adapter, path, dtype)

    monkeypatch.setattr(outcome, "save_adapter", full)
    short = {**config, "max_train_steps": 6}
    result = train(TrainConfig(**short))
    kept = [path.name for path in (Path(config["output_dir"]) / "checkpoints").iterdir()]
    assert result.adapter_path.parent == Path(config["output_dir"]) and kept == ["step-000006.safetensors"]
    assert "the disk is full: step-000002.safetensors, step-000004.safetensors made room." in caplog.text
    room["after"] = 99
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elsewhere = train(TrainConfig(**short)).adapter_path
    assert read_adapter(elsewhere).shifts and f"The adapter is saved in {elsewhere}: move it from there" in caplog.text
    assert events(config, "end")[0].adapter is None and str(elsewhere) in events(config, "end")[0].message


def test_a_full_disk_costs_the_pictures_of_a_look_but_not_its_measures(config, monkeypatch, caplog):
    from svfit_dreambooth.training import watch as validation

    fill_disk_at(monkeypatch, validation, "save_png", "step_000004.png")
    options = {**config, "validation_steps": 4, "num_inference_steps": 1, "validation_prompts": ["a dog"]}
    assert train(TrainConfig(**options)).steps == 8 and "the look at step 4 is not kept whole" in caplog.text
    assert [event.step for event in events(config, "measure")] == [0, 4, 8]
    assert [event.step for event in events(config, "pictures")] == [0, 8]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        SVFitError("a sentence."),
        OSError(28, "No space left on device"),
        KeyboardInterrupt(),
        signal.SIGTERM,
    ],
)
def test_pictures_that_fail_at_the_end_cost_only_themselves(config, monkeypatch, caplog, error):
    def fail(*args):
        assert (Path(config["output_dir"]) / "my-dog-kohya.safetensors").is_file()  # made before what takes minutes
        if error is signal.SIGTERM:
            os.kill(os.getpid(), error)
            time.sleep(5)
        raise error

    monkeypatch.setattr("svfit_dreambooth.training.result.show_result", fail)
    result = train(TrainConfig(**{**config, "final_pictures": True, "max_train_steps": 2}, also="kohya"))
    assert result.showing is None and "LoRA: " in result.summary()
    (end,) = events(config, "end")
    assert end.status == "finished" and end.adapter == "my-dog.safetensors" and end.sheet is None
    (line,) = [record.message for record in caplog.records if "pictures at the end are missing" in record.message]
    assert f"The adapter is saved in {result.adapter_path}." in line


def test_final_pictures_of_a_float32_run_need_no_second_base(config, monkeypatch, tiny_base):
    monkeypatch.setattr("svfit_dreambooth.training.result.open_run_base", None)  # never called
    result = train(TrainConfig(**{**config, "final_pictures": True, "num_inference_steps": 1}, also="kohya"))
    assert result.showing.sheet.is_file() and "LoRA: " in result.summary()
    base, fresh = result.base.pipeline, open_base_model(str(tiny_base)).pipeline
    for name, module in pipeline_components(fresh).items():
        theirs = getattr(base, name).state_dict()
        assert set(theirs) == set(module.state_dict())
        assert all(torch.equal(theirs[key], tensor) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_that_rounded_its_base_ends_with_one_base_in_memory(config, monkeypatch, tiny_base, precision):
    from svfit_dreambooth.training import result as outcome

    runs, held, alive = [], [], []

    def note(config, **options):
        runs.append(prepare(config, **options))
        return runs[0]

    def reopen(config):
        alive.append(sum(reference() is not None for reference in held))
        return open_run_base(config)

    monkeypatch.setattr("svfit_dreambooth.training.run.prepare", note)
    monkeypatch.setattr(outcome, "open_run_base", reopen)
    options = {**config, "final_pictures": True, "num_inference_steps": 1, "max_train_steps": 2}

    def hold(step):
        for module in (runs[0].base.pipeline.unet, runs[0].base.pipeline.vae):
            held.extend(weakref.ref(each) for each in module.parameters() if not each.requires_grad)

    result = train(TrainConfig(**options, mixed_precision=precision, also="kohya"), on_step=hold)
    assert held and alive == ([] if precision == "fp16" else [0])
    assert result.showing.sheet.is_file() and not result.base.pipeline.unet.conv_in.weight.is_meta
    path = Path(config["output_dir"]) / "from the files.safetensors"
    export_lora(result.adapter_path, open_base_model(str(tiny_base)), path, error=outcome.ALSO_ERROR)
    ours, theirs = (load_file(each) for each in (path.with_name("my-dog-kohya.safetensors"), path))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_base_that_is_gone_at_the_end_costs_only_what_needs_it(config, monkeypatch, caplog):
    def gone(config):
        raise SVFitError("the base model cannot be opened: it was moved.")

    monkeypatch.setattr("svfit_dreambooth.training.result.open_run_base", gone)
    options = {**config, "final_pictures": True, "max_train_steps": 2}
    result = train(TrainConfig(**options, mixed_precision="bf16", also="kohya"))
    assert result.adapter_path.is_file() and events(config, "end")[0].status == "finished"
    assert "there is no LoRA" in caplog.text and "pictures at the end are missing" in caplog.text


def test_final_pictures_take_the_precision_of_the_run(config, monkeypatch):
    seen = []

    def note(model, prompts, **options):
        seen.append({model.pipeline.unet.dtype, model.pipeline.text_encoder.dtype})
        return generate(model, prompts, **options)

    monkeypatch.setattr("svfit_dreambooth.training.showcase.generate", note)
    options = {**config, "final_pictures": True, "num_inference_steps": 1, "max_train_steps": 2}
    train(TrainConfig(**options, mixed_precision="bf16"))
    assert seen == [{torch.bfloat16}] * 2


def test_photos_deleted_while_training_are_missing_from_the_sheet_alone(config, photo_folder, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder, folder)
    options = {**config, "instance_data_dir": str(folder), "final_pictures": True, "num_inference_steps": 1}
    result = train(TrainConfig(**options), on_step=lambda step: shutil.rmtree(folder, ignore_errors=True) and None)
    assert result.showing.sheet.is_file()


def test_running_out_of_memory_is_a_sentence(config, monkeypatch):
    def loss(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 999 bytes")

    monkeypatch.setattr(Objective, "loss", loss)
    with pytest.raises(SVFitError, match="out of memory: go on with resume_from_checkpoint latest") as error:
        train(TrainConfig(**config))
    assert "\n" not in str(error.value)


def test_other_runtime_errors_are_not_disguised(config, monkeypatch):
    def loss(*args):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Objective, "loss", loss)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train(TrainConfig(**config))


def test_the_folder_is_locked_while_a_run_writes_into_it(config):
    seen = []

    def second(step):
        with pytest.raises(SVFitError, match="another run is writing into"):
            train(TrainConfig(**config))
        seen.append(step.step)
        return True

    train(TrainConfig(**config), on_step=second)
    assert seen == [1]
    with RunFolder(config["output_dir"]).locked():
        pass


def test_a_second_run_moves_the_first_aside(config):
    first = train(TrainConfig(**config))
    content = first.adapter_path.read_bytes()
    train(TrainConfig(**{**config, "seed": 1}))
    assert (Path(config["output_dir"]) / "earlier" / "001" / "my-dog.safetensors").read_bytes() == content
    assert first.adapter_path.read_bytes() != content


def test_looks_on_the_way_keep_the_best_step(config, monkeypatch):
    scores, seen = {0: 9.0, 3: 0.2, 6: 0.7, 8: 0.5}, []

    def liked(measured):
        seen.append(measured.step)
        return scores[measured.step]

    monkeypatch.setattr("svfit_dreambooth.training.loop.score", liked)
    options = {**config, "validation_steps": 3, "num_inference_steps": 1, "validation_prompts": ["a dog", "a cat"]}
    result = train(TrainConfig(**options))
    assert seen == [0, 3, 6, 8] and result.kept_step == 6 and "kept: step 6" in result.summary()
    saved = read_adapter(result.adapter_path)
    assert saved.training["kept_step"] == 6
    folder = Path(config["output_dir"])
    assert len(list((folder / "validation").glob("*.png"))) == 4 and (folder / "curve.png").stat().st_size > 1000
    assert [event.step for event in events(config, "measure")] == [0, 3, 6, 8]
    looks = {int(path.stem[5:]): read_adapter(path) for path in (folder / "validation").glob("*.safetensors")}
    assert sorted(looks) == [3, 6, 8] and looks[3].training["steps"] == 3
    for name, shift in saved.shifts.items():
        assert torch.equal(looks[6].shifts[name], shift)
    last = train(TrainConfig(**{**options, "keep": "last"}))
    assert last.kept_step == 8
    assert all(
        torch.equal(looks[8].shifts[name], shift) for name, shift in read_adapter(last.adapter_path).shifts.items()
    )
    different = read_adapter(last.adapter_path).shifts
    assert any(not torch.equal(shift, saved.shifts[name]) for name, shift in different.items())


def test_trackers_get_the_losses(config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(TrainConfig(**config, report_to="tensorboard"))
    (folder,) = {
        path.parent
        for path in (Path(config["output_dir"]) / "logs").rglob("events.out.*")
        if path.parent.name == "svfit"
    }
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def test_an_unknown_tracker_is_a_sentence(config):
    with pytest.raises(SVFitError, match="report_to is 'nonsense', but must be one of: .*tensorboard"):
        train(TrainConfig(**config, report_to="nonsense"))


def test_a_tracker_that_is_not_installed_says_so(config, monkeypatch):
    monkeypatch.setattr("svfit_dreambooth.training.processes.get_available_trackers", list)
    with pytest.raises(SVFitError, match="report_to wandb needs a package that is not installed"):
        train(TrainConfig(**config, report_to="wandb"))


def test_a_lora_is_written_beside_the_adapter(config):
    """With its learned word and its cards; a later run sets all of it aside."""
    pictures = {"final_pictures": True, "num_inference_steps": 1, "max_train_steps": 2}
    result = train(TrainConfig(**{**config, **pictures}, also="kohya", learned_word="sks"))
    folder = Path(config["output_dir"])
    lora = load_file(folder / "my-dog-kohya.safetensors")
    assert any(name.startswith("lora_unet_") for name in lora) and "LoRA: " in result.summary()
    assert set(load_file(folder / "my-dog-kohya-sks.safetensors")) == {"my-dog-kohya-sks"}
    assert "in other programs write my-dog-kohya-sks in its place" in result.summary()
    card = json.loads((folder / "my-dog-kohya.json").read_text(encoding="utf-8"))
    assert card["activation text"] == "a photo of my-dog-kohya-sks dog"
    assert (folder / "my-dog-kohya.preview.png").is_file()
    train(TrainConfig(**config))
    assert not list(folder.glob("my-dog-kohya*")) and len(list(folder.glob("earlier/001/my-dog-kohya*"))) == 4
    with pytest.raises(SVFitError, match="also is 'zip'"):
        TrainConfig(also="zip")


def test_the_file_says_what_it_looks_like_and_where_it_comes_from(config):
    result = train(TrainConfig(**{**config, "final_pictures": True, "num_inference_steps": 1}))
    metadata = read_adapter(result.adapter_path).metadata
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert result.file_bytes == result.adapter_path.stat().st_size
