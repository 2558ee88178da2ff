"""Looking at a run while it trains."""

import numpy as np
import pytest
import torch
from PIL import Image

from svfit_dreambooth import TrainConfig, train
from svfit_dreambooth.bases.families import apply_svfit
from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.evaluation.features import Features, open_features
from svfit_dreambooth.method.targets import get_shifts, set_shifts
from svfit_dreambooth.training.events import Measured
from svfit_dreambooth.training.plan import prepare
from svfit_dreambooth.training.watch import CLEARLY, Watch, cut, join, score, validation_prompts
from svfit_dreambooth.training.words import learn_words


@pytest.fixture
def run(tiny_run, tmp_path):
    return tiny_run(
        class_prompt="a photo of a dog",
        output_dir=str(tmp_path / "run"),
        validation_prompts=["a photo of sks dog on the beach", "a photo of sks dog"],
        num_inference_steps=2,
    )


def pixels(images):
    """A feature that anyone can recompute: the mean colour."""
    return torch.tensor(np.stack([np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) for image in images]))


def test_looks_paint_measure_and_compare_with_the_base(run, tmp_path):
    texts = []

    def read(prompts):
        texts.extend(prompts)
        return torch.ones(len(prompts), 3)

    watch = Watch(run, Features(subject=pixels, picture=pixels, text=read))
    shifts = apply_svfit(run.base.pipeline.unet)
    before = watch.look(0, 0.5)
    assert before.drift == pytest.approx(0, abs=1e-6) and -1 <= before.subject <= 1 and before.fixed_loss == 0.5
    assert texts == ["a photo of a dog on the beach", "a photo of a dog"]  # no reader of pictures knows what sks is
    set_shifts(run.base.pipeline.unet, {name: torch.full_like(shift, 0.5) for name, shift in shifts.items()})
    after = watch.look(3, 0.4)
    assert after.drift > 1e-6 and score(after) == pytest.approx(after.subject + after.prompt - after.drift)
    folder = tmp_path / "run" / "validation"
    first, second = (Image.open(folder / f"step_00000{step}.png") for step in (0, 3))
    assert first.size == (32, 16) and np.any(np.asarray(first) != np.asarray(second))
    grid = Image.open(tmp_path / "run" / "validation.png").size
    run.folder.rewind(2)
    assert [path.name for path in folder.iterdir()] == ["step_000000.png"]
    watch.draw_grid()
    assert Image.open(tmp_path / "run" / "validation.png").size[1] < grid[1]


def test_drift_is_measured_from_the_base_also_where_a_run_begins_away_from_it(run, tiny_run, tmp_path):
    unet = run.base.pipeline.unet
    shifts = apply_svfit(unet)
    given = {name: torch.full_like(shift, 0.5) for name, shift in shifts.items()}
    set_shifts(unet, given)
    (delta,) = learn_words(run.base.family, "sks").values()
    delta.data.fill_(0.5)
    watch = Watch(run, Features(subject=pixels))
    first = watch.look(0, None)
    assert all(torch.equal(shift, given[name]) for name, shift in get_shifts(unet).items()) and (delta == 0.5).all()
    plain = Watch(tiny_run(output_dir=str(tmp_path / "plain"), num_inference_steps=2), Features(subject=pixels))
    plain.look(0, None)
    assert torch.equal(watch.untouched, plain.untouched)
    assert first.drift > 1e-6 and first.drift == watch.look(1, None).drift


def test_without_features_the_loss_decides(run):
    measure = Watch(run, Features()).look(0, 0.25)
    assert measure == Measured(0, 0.25) and score(measure) == -0.25 and score(Measured(0)) is None


def test_photos_that_are_gone_cost_the_likeness_alone(run, caplog, monkeypatch):
    monkeypatch.setattr("svfit_dreambooth.training.watch.run_photos", lambda run: [])
    measured = Watch(run, Features(subject=pixels)).look(0, 0.25)
    assert measured.subject is None and score(measured) == -0.25 and "the photos are gone" in caplog.text


def test_strips_are_cut_as_they_were_joined():
    pictures = [Image.new("RGB", (3, 2), colour) for colour in ("red", "green", "blue")]
    for picture, again in zip(pictures, cut(join(pictures), 3), strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(again))


def test_default_prompts_of_a_bundled_subject_are_places_without_a_photo(tmp_path):
    from toybox.world import PHOTO_SETTINGS, SETTING_PHRASES

    run = prepare(TrainConfig(output_dir=str(tmp_path)))
    prompts = validation_prompts(run)
    photographed = [SETTING_PHRASES[place] for place in PHOTO_SETTINGS["dog_patch"]]
    assert len(prompts) == 4 and all(prompt.startswith("a photo of sks dog ") for prompt in prompts)
    assert not any(prompt.endswith(place) for prompt in prompts for place in photographed)


def test_toybox_brings_its_judge_and_other_bases_nothing():
    features = open_features(DEFAULT_BASE)
    images = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")]
    assert features.subject(images).shape == (2, 128) and features.text(["a red car"]).shape[0] == 1
    assert open_features("another base").any is None


@pytest.fixture
def config(tiny_options):
    return tiny_options | {
        "train_batch_size": 1,
        "learning_rate": 0.05,
        "fixed_loss_examples": 0,
    }


def scored(monkeypatch, points):
    """Looks find these scores, one after the other from the first step's on; returns the steps of the looks."""
    seen = []

    def look(self, step, fixed_loss):
        seen.append(step)
        value = 0.0 if step == 0 else points[len(seen) - 2]
        return Measured(step, fixed_loss, subject=value, drift=0.0)

    monkeypatch.setattr(Watch, "look", look)
    return seen


def test_looks_are_closer_together_at_the_beginning(config, monkeypatch):
    seen = scored(monkeypatch, [0.1, 0.2, 0.3, 0.4, 0.5])
    result = train(TrainConfig(**{**config, "max_train_steps": 16, "validation_steps": "auto"}))
    assert seen == [0, 2, 4, 8, 12, 16] and result.kept_step == result.steps == 16


@pytest.mark.parametrize(
    ("points", "patience", "steps"),
    [
        ([1.5, 1.2, 1.2, 0.9, 0.9], None, 8),  # two in a row
        ([1.5, 1.2, 1.42, 1.2, 1.2], None, 16),  # one is as good as the best within the noise of looks
        ([1.5, 1.42, 1.33, 1.35, 1.3], None, 12),  # the best one is what others are held against
        ([1.5, 1.2, 0.9, 0.6, 0.3], 0, 16),
        ([0.3, 1.5, 1.2, 1.8, 1.5], 1, 8),
    ],
)
def test_a_run_ends_when_its_looks_say_so(config, monkeypatch, points, patience, steps):
    seen = scored(monkeypatch, points)
    options = {**config, "max_train_steps": 16, "validation_steps": "auto", "patience": patience}
    result = train(TrainConfig(**options))
    assert result.steps == seen[-1] == steps and not result.stopped
    as_good = [seen[1 + i] for i in range(len(seen) - 1) if points[i] > max(points[: len(seen) - 1]) - CLEARLY]
    assert result.kept_step == as_good[-1]
    again = train(TrainConfig(**options, resume_from_checkpoint="latest"))  # of a finished run changes nothing
    assert again.steps == steps and again.kept_step == result.kept_step


def test_looks_that_were_asked_for_by_number_end_nothing(config, monkeypatch):
    seen = scored(monkeypatch, [0.5] + [0.1] * 9)
    result = train(TrainConfig(**{**config, "max_train_steps": 6, "validation_steps": 2}))
    assert seen == [0, 2, 4, 6] and result.steps == 6 and result.kept_step == 2
