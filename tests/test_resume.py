"""A run that was killed and goes on makes the adapter of one that was never interrupted, to the bit."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from svfit_dreambooth import TrainConfig, files, read_adapter, train
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.training.checkpoints import list_checkpoints, load_checkpoint, run_identity
from svfit_dreambooth.training.ending import Ending, training_record
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.optimizer import Steps
from svfit_dreambooth.training.plan import prepare


@pytest.fixture(scope="module")
def config(tiny_base, photo_folder):
    return {
        "pretrained_model_name_or_path": str(tiny_base),
        "instance_data_dir": str(photo_folder),
        "instance_prompt": "a photo of sks dog",
        "max_train_steps": 12,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lr_warmup_steps": 3,
        "train_text_encoder": True,
        "resolution": 16,
        "fixed_loss_examples": 1,
        "checkpointing_steps": 3,
        "checkpoints_total_limit": 2,
        "validation_steps": 5,
        "validation_prompts": ["a dog"],
        "num_inference_steps": 1,
        "final_pictures": False,
        "save_dtype": "float32",
    }


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return train(TrainConfig(**config, output_dir=str(folder)))


def killed(config, folder, kill):
    """Trains in a child process, in which `kill` arranges a SIGKILL; returns whether it came to that."""
    child = os.fork()
    if child == 0:
        try:
            on_step = kill(lambda: os.kill(os.getpid(), signal.SIGKILL))
            train(TrainConfig(**config, output_dir=str(folder), resume_from_checkpoint="latest"), on_step=on_step)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def at_step(number):
    def kill(now):
        return lambda step: now() if step.step == number else None

    return kill


def while_writing(name, nth, moment):
    """Dies at the `nth` writing of a file whose name starts with `name`, before its bytes are complete or renamed."""

    def kill(now):
        count = 0
        replace, fsync = os.replace, os.fsync

        def dying_replace(source, target):
            nonlocal count
            if Path(target).name.startswith(name):
                count += 1
                if count == nth and moment == "before renaming":
                    now()
                replace(source, target)
                if count == nth and moment == "after renaming":
                    now()
                return
            replace(source, target)

        files.os.replace = dying_replace
        files.os.fsync = fsync

    return kill


def assert_same_values(first, second):
    """The same to the bit; the files themselves may list their metadata in another order."""
    one, other = read_adapter(first), read_adapter(second)
    assert one.metadata["payload_sha256"] == other.metadata["payload_sha256"] and one.training == other.training
    assert all(torch.equal(one.shifts[name], other.shifts[name]) for name in other.shifts)


def assert_same(config, folder, whole):
    result = train(TrainConfig(**config, output_dir=str(folder), resume_from_checkpoint="latest"))
    assert result.steps == whole.steps and result.kept_step == whole.kept_step
    assert_same_values(result.adapter_path, whole.adapter_path)
    ours, theirs = (
        [(event.name, event.step, getattr(event, "loss", None)) for event in RunFolder(path).events()]
        for path in (folder, whole.adapter_path.parent)
    )
    for kind in ("step", "measure", "pictures"):
        assert [event for event in ours if event[0] == kind] == [event for event in theirs if event[0] == kind]


@pytest.mark.parametrize("number", [1, *random.Random(0).sample(range(2, 12), 4), 12])
def test_killed_after_a_step(config, whole, tmp_path, number):
    assert killed(config, tmp_path, at_step(number))
    with RunFolder(tmp_path).locked():  # its own died with it
        pass
    assert_same(config, tmp_path, whole)


@pytest.mark.parametrize("moment", ["before renaming", "after renaming"])
@pytest.mark.parametrize(("name", "nth"), [("step-", 1), ("step-", 3), ("my-dog.safetensors", 1)])
def test_killed_while_writing(config, whole, tmp_path, name, nth, moment):
    assert killed(config, tmp_path, while_writing(name, nth, moment))
    assert_same(config, tmp_path, whole)


def test_killed_again_and_again(config, whole, tmp_path):
    for number in (2, 4, 5, 9):
        assert killed(config, tmp_path, at_step(number))
    assert_same(config, tmp_path, whole)


def test_a_finished_run_is_left_as_it_is(config, whole):
    before = {
        path: path.stat().st_mtime_ns
        for path in [whole.adapter_path, *list_checkpoints(whole.adapter_path.parent / "checkpoints")]
    }
    content = whole.adapter_path.read_bytes()
    again = train(TrainConfig(**config, output_dir=str(whole.adapter_path.parent), resume_from_checkpoint="latest"))
    assert again.steps == whole.steps and again.kept_step == whole.kept_step and not again.stopped
    assert whole.adapter_path.read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_only_the_newest_checkpoints_are_kept(whole):
    names = [path.stem for path in list_checkpoints(whole.adapter_path.parent / "checkpoints")]
    assert names == ["step-000009", "step-000012"]


def test_a_named_checkpoint_resumes_into_another_folder(config, whole, tmp_path):
    checkpoint = whole.adapter_path.parent / "checkpoints" / "step-000009.safetensors"
    result = train(TrainConfig(**config, output_dir=str(tmp_path), resume_from_checkpoint=str(checkpoint)))
    assert_same_values(result.adapter_path, whole.adapter_path)


def test_a_base_that_was_moved_is_known_by_its_weights(config, whole, tmp_path):
    checkpoint = whole.adapter_path.parent / "checkpoints" / "step-000009.safetensors"
    moved = shutil.copytree(config["pretrained_model_name_or_path"], tmp_path / "moved")
    options = {**config, "pretrained_model_name_or_path": str(moved)}
    result = train(TrainConfig(**options, output_dir=str(tmp_path / "b"), resume_from_checkpoint=str(checkpoint)))
    assert_same_values(result.adapter_path, whole.adapter_path)


def test_a_run_that_lacked_memory_goes_on_without_looks_and_with_checkpointed_gradients(config, whole, tmp_path):
    checkpoint = whole.adapter_path.parent / "checkpoints" / "step-000009.safetensors"

    def resume(name, **changes):
        options = {**config, **changes, "output_dir": str(tmp_path / name), "resume_from_checkpoint": str(checkpoint)}
        return train(TrainConfig(**options))

    last = resume("last", keep="last")
    blind = resume("blind", validation_steps=0)
    assert blind.kept_step == 12  # the best of earlier looks, step 5, is not held against what nobody looked at
    first, second = read_adapter(last.adapter_path).shifts, read_adapter(blind.adapter_path).shifts
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resume("spared", gradient_checkpointing=True).steps == 12


def test_latest_is_the_newest_checkpoint_that_is_whole(config, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(whole.adapter_path.parent, folder)
    newest = folder / "checkpoints" / "step-000012.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1  # of a value
    newest.write_bytes(content)
    options = {**config, "output_dir": str(folder)}
    result = train(TrainConfig(**options, resume_from_checkpoint="latest"))
    assert "step-000012.safetensors is damaged, its checksum differs: it is passed over" in caplog.text
    assert_same_values(result.adapter_path, whole.adapter_path)
    for path in list_checkpoints(folder / "checkpoints"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SVFitError, match="none of the checkpoints in .* is whole: delete them to start anew"):
        train(TrainConfig(**options, resume_from_checkpoint="latest"))


def test_a_finished_run_goes_on_with_more_steps(config, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole.adapter_path.parent, folder)
    options = {**config, "output_dir": str(folder), "max_train_steps": 14, "resume_from_checkpoint": "latest"}
    result = train(TrainConfig(**options))
    steps = [event.step for event in RunFolder(folder).events() if event.name == "step"]
    assert result.steps == 14 and steps == list(range(1, 15))


def test_a_base_that_was_moved_is_the_same_base(config, whole, tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "moved")
    shutil.copytree(whole.adapter_path.parent, tmp_path / "run")
    options = {**config, "pretrained_model_name_or_path": str(tmp_path / "moved"), "output_dir": str(tmp_path / "run")}
    assert train(TrainConfig(**options, resume_from_checkpoint="latest")).steps == 12


def test_as_many_processes_go_on_as_there_were(config, whole):
    path, run = list_checkpoints(whole.adapter_path.parent / "checkpoints")[0], prepare(TrainConfig(**config))
    base = fingerprint(run.weights())
    assert load_checkpoint(path, run_identity(run, base)).step == 9
    with pytest.raises(SVFitError, match="was made with num_processes 1, not 2"):
        load_checkpoint(path, run_identity(run, base, 2))
    assert training_record(run, Steps({"a": 0.05}), Ending(12, 12, 1.0, None, None), 2)["batch_size"] == 2 * 2 * 2


def looks(folder):
    measured = [event.step for event in RunFolder(folder).events() if event.name == "measure"]
    return measured, sorted(int(path.stem.partition("_")[2]) for path in (folder / "validation").glob("*.png"))


def test_an_older_checkpoint_of_the_same_run_takes_back_what_came_after_it(config, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole.adapter_path.parent, folder)
    assert looks(folder) == ([0, 5, 10, 12], [0, 5, 10, 12])
    checkpoint, seen = folder / "checkpoints" / "step-000009.safetensors", []

    def note(step):
        seen.append((looks(folder), [path.stem for path in list_checkpoints(folder / "checkpoints")]))
        return True

    options = {**config, "output_dir": str(folder)}
    train(TrainConfig(**options, resume_from_checkpoint=str(checkpoint)), on_step=note)
    assert seen == [(([0, 5, 10], [0, 5, 10]), ["step-000009"])]
    assert [path.stem for path in list_checkpoints(folder / "checkpoints")] == ["step-000009", "step-000010"]
    again = train(TrainConfig(**options, resume_from_checkpoint="latest"))
    assert_same_values(again.adapter_path, whole.adapter_path)
    assert looks(folder) == ([0, 5, 10, 12], [0, 5, 10, 12])


def test_a_checkpoint_from_elsewhere_moves_an_earlier_run_aside(config, whole, tmp_path):
    train(TrainConfig(**{**config, "seed": 1, "output_dir": str(tmp_path)}), on_step=lambda step: step.step == 5)
    other = whole.adapter_path.parent / "checkpoints" / "step-000009.safetensors"
    train(TrainConfig(**config, output_dir=str(tmp_path), resume_from_checkpoint=str(other)))
    assert looks(tmp_path / "earlier" / "001") == ([0, 5], [0, 5]) and looks(tmp_path) == ([10, 12], [10, 12])
    assert [event.name for event in RunFolder(tmp_path).events()].count("start") == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"learning_rate": 0.01}, "was made with learning_rate auto, not 0.01"),
        ({"rank": "4"}, "was made with rank full, not 4"),
        ({"max_train_steps": 11}, "was made with max_train_steps 12, not 11"),
        ({"resume_from_checkpoint": "/no/such/file"}, "/no/such/file is no file"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(config, whole, changes, sentence):
    options = {**config, "output_dir": str(whole.adapter_path.parent), "resume_from_checkpoint": "latest", **changes}
    with pytest.raises(SVFitError, match=sentence):
        train(TrainConfig(**options))
    assert whole.adapter_path.is_file()


def test_checkpoints_of_other_photos_or_that_are_none_are_refused(config, whole, photo_folder, tmp_path):
    fewer = tmp_path / "my dog"
    fewer.mkdir()
    for photo in sorted(photo_folder.glob("*.png"))[:2]:
        (fewer / photo.name).write_bytes(photo.read_bytes())
    options = {**config, "output_dir": str(whole.adapter_path.parent), "resume_from_checkpoint": "latest"}
    with pytest.raises(SVFitError, match="belongs to other photos"):
        train(TrainConfig(**{**options, "instance_data_dir": str(fewer)}))
    shutil.copy(photo_folder / "photo 2.png", fewer / "photo two.png")  # the same picture, cropped elsewhere
    with pytest.raises(SVFitError, match="belongs to other photos"):
        train(TrainConfig(**{**options, "instance_data_dir": str(fewer)}))
    with pytest.raises(SVFitError, match="is not a checkpoint"):
        train(TrainConfig(**{**options, "resume_from_checkpoint": str(whole.adapter_path)}))
    broken = tmp_path / "step-000001.safetensors"
    broken.write_bytes(b"half a fi")
    with pytest.raises(SVFitError, match="cannot be read"):
        train(TrainConfig(**{**options, "resume_from_checkpoint": str(broken)}))
