"""Several subjects in one run: each adapter is that of its own run."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from svfit_dreambooth import TrainConfig, read_adapter, train
from svfit_dreambooth.bases.devices import MIXED_PRECISION
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.subjects.together import train_all, train_together
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.loop import Loop
from svfit_dreambooth.training.stepping import NotFinite

SIZES = {"dog": [(40, 30), (24, 36), (32, 32)], "cat": [(32, 32), (30, 40)], "mug": [(32, 32)]}


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """A folder of photos for each of three subjects, of several shapes."""
    folder, generator = tmp_path_factory.mktemp("subjects"), np.random.default_rng(1)
    for name, sizes in SIZES.items():
        (folder / name).mkdir()
        for number, (width, height) in enumerate(sizes):
            pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def configs(tiny_base, subjects, tmp_path):
    """A function of options to a config for each subject, in a folder of the name given."""

    def make(name, names=tuple(SIZES), **options):
        common = {
            "pretrained_model_name_or_path": str(tiny_base),
            "max_train_steps": 5,
            "train_batch_size": 2,
            "resolution": 16,
            "fixed_loss_examples": 2,
            "validation_steps": 0,
            "final_pictures": False,
            "save_dtype": "float32",
        } | options
        return [
            TrainConfig(
                **common,
                instance_data_dir=str(subjects / subject),
                instance_prompt=f"a photo of sks {subject}",
                output_dir=str(tmp_path / name / subject),
            )
            for subject in names
        ]

    return make


def farthest(first, second):
    """The largest difference between the values of two adapter files that hold the same."""
    one, other = read_adapter(first), read_adapter(second)
    assert one.ranks == other.ranks and one.base_fingerprint == other.base_fingerprint
    values = [*one.shifts.items(), *one.word_deltas().items()]
    others = {**other.shifts, **other.word_deltas()}
    assert any(value.any() for _, value in values)
    return max(float((value - others[name]).abs().max()) for name, value in values)


VARIANTS = {
    "accumulated": {"gradient_accumulation_steps": 2, "snr_gamma": 5.0, "gradient_checkpointing": True},
    "budget": {"budget": 60, "train_text_encoder": True},
    "word": {"learned_word": "sks", "rank": 7},
}


SLOW = ("accumulated", "word")


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VARIANTS]
)
def test_each_adapter_is_that_of_its_own_run(configs, variant):
    options = VARIANTS[variant]
    names = ("dog", "mug")
    outcomes = train_together(configs("together", names, **options))
    assert [outcome.state for outcome in outcomes] == ["finished"] * 2, outcomes
    for outcome, config in zip(outcomes, configs("alone", names, **options), strict=True):
        assert farthest(outcome.adapter, train(config).adapter_path) < 1e-3


def test_in_float64_to_the_last_digits(configs, monkeypatch):
    monkeypatch.setitem(MIXED_PRECISION, "no", torch.float64)
    outcomes = train_together(configs("together", learning_rate=0.05))
    for outcome, config in zip(outcomes, configs("alone", learning_rate=0.05), strict=True):
        alone = train(config)
        ours, theirs = (
            load_file(path.parent / "checkpoints/step-000005.safetensors")
            for path in (outcome.adapter, alone.adapter_path)
        )
        assert set(ours) == set(theirs) and any(tensor.dtype == torch.float64 for tensor in ours.values())
        assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9) for name in ours)
        assert outcome.result.loss_after == pytest.approx(alone.loss_after, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_values_point_the_same_way(configs, precision):
    options = {"mixed_precision": precision, "max_train_steps": 3, "adam_epsilon": 1e-3, "train_text_encoder": True}
    (outcome, _), (config,) = (
        train_together(configs("together", ("dog", "cat"), **options)),
        configs("alone", ("dog",), **options),
    )
    ours, theirs = (read_adapter(path).shifts for path in (outcome.adapter, train(config).adapter_path))
    first, second = (torch.cat([shifts[name] for name in ours]) for shifts in (ours, theirs))
    assert torch.cosine_similarity(first, second, 0) > 0.99


def events(outcome, kind):
    return [event for event in RunFolder(outcome.folder).events() if event.name == kind]


def test_looks_and_the_best_step_are_each_subjects_own(configs):
    options = {"validation_steps": 2, "validation_prompts": ["a dog"], "num_inference_steps": 1}
    together = train_together(configs("together", ("dog", "cat"), **options))
    for outcome, config in zip(together, configs("alone", ("dog", "cat"), **options), strict=True):
        alone = train(config)
        assert outcome.result.kept_step == alone.kept_step
        ours, theirs = (RunFolder(folder).events() for folder in (outcome.folder, alone.adapter_path.parent))
        # "phase" announces what takes time, and what runs second may find that done
        names = [[event.name for event in all_ if event.name != "phase"] for all_ in (ours, theirs)]
        assert names[0] == names[1]
        measured = [[event.fixed_loss for event in all_ if event.name == "measure"] for all_ in (ours, theirs)]
        assert len(measured[0]) == 4 and measured[0] == pytest.approx(measured[1], abs=2e-5)
        assert (outcome.folder / "validation" / "step_000002.png").is_file()


def test_bad_numbers_of_one_send_back_that_one_alone(configs, monkeypatch):
    checked, spoilt = Loop.checked, []

    def spoil(loop, loss):
        if loop.folder.adapter_name == "cat" and loop.step == 2 and not spoilt:
            spoilt.append(loop)
            raise NotFinite("the loss is nan at step 3")
        return checked(loop, loss)

    monkeypatch.setattr(Loop, "checked", spoil)
    options = {"checkpointing_steps": 1, "max_train_steps": 3}
    dog, cat = train_together(configs("together", ("dog", "cat"), **options))
    assert [event.step for event in events(cat, "rollback")] == [2] and not events(dog, "rollback")
    assert [event.step for event in events(cat, "step")] == [1, 2, 3] and cat.state == "finished"
    (alone,) = configs("alone", ("dog",), **options)
    assert farthest(dog.adapter, train(alone).adapter_path) < 1e-3


def test_a_subject_that_lastingly_fails_keeps_what_it_learnt(configs, monkeypatch):
    checked = Loop.checked

    def spoil(loop, loss):
        if loop.folder.adapter_name == "cat" and loop.step == 2:
            raise NotFinite("the loss is nan at step 3")
        return checked(loop, loss)

    monkeypatch.setattr(Loop, "checked", spoil)
    dog, cat = train_together(configs("together", ("dog", "cat"), checkpointing_steps=1, max_train_steps=3))
    assert (dog.state, cat.state) == ("finished", "failed") and "also after 3 returns to step 2" in cat.message
    assert read_adapter(cat.adapter).training["steps"] == 2 and events(cat, "end")[0].status == "failed"


def test_what_is_stopped_goes_on_to_the_bit_and_what_is_finished_is_left(configs):
    options = {"max_train_steps": 4, "train_text_encoder": True, "resume_from_checkpoint": "latest"}
    names = ("dog", "cat")
    whole = train_together(configs("whole", names, **options))
    stopped = train_together(configs("stopped", names, **options), on_step=lambda name, step: step.step == 2)
    assert [outcome.state for outcome in stopped] == ["stopped"] * 2
    on = train_together(configs("stopped", names, **options))
    assert [outcome.state for outcome in on] == ["finished"] * 2
    for first, second in zip(whole, on, strict=True):
        assert farthest(first.adapter, second.adapter) == 0
    written = [outcome.adapter.stat().st_mtime_ns for outcome in on]
    again = train_all(configs("stopped", names, **options), at_once=1)
    assert [outcome.state for outcome in again] == ["finished before"] * 2
    assert [outcome.adapter.stat().st_mtime_ns for outcome in again] == written


def test_each_run_folder_goes_on_alone(configs):
    options = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    train_together(configs("run", ("dog", "cat"), **options), on_step=lambda name, step: step.step == 2)
    (config,) = configs("run", ("dog",), **options)
    (whole,) = configs("alone", ("dog",), **options)
    result = train(config)
    assert result.ending.status == "finished"
    assert farthest(result.adapter_path, train(whole).adapter_path) < 1e-3


def test_one_bad_subject_stops_nobody(configs, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    dog, cat, mug = configs("run", max_train_steps=1)
    bad = dataclasses.replace(cat, instance_data_dir=str(empty))
    worse = dataclasses.replace(mug, learned_word="snow")
    outcomes = train_together([bad, dog, worse])
    assert [outcome.state for outcome in outcomes] == ["failed", "finished", "failed"]
    assert "empty" in outcomes[0].message and "does not occur in the prompt" in outcomes[2].message
    with RunFolder(worse.output_dir).locked():  # nothing is held any more
        pass


def test_what_must_be_alike(configs):
    dog, cat, _ = configs("run")
    with pytest.raises(SVFitError, match="train_batch_size is 2 for one subject and 1 for another"):
        train_together([dog, dataclasses.replace(cat, train_batch_size=1)])
    with pytest.raises(SVFitError, match="is that of two subjects"):
        train_together([dog, dataclasses.replace(cat, output_dir=dog.output_dir)])
