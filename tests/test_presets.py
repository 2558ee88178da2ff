"""Recipes for what was left open."""

import dataclasses
from typing import get_args, get_type_hints

import pytest

from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.plan import prepare
from svfit_dreambooth.training.presets import PRESETS, preset_names, with_preset


def test_every_base_has_the_presets_that_the_option_offers():
    offered = set(get_args(get_type_hints(TrainConfig)["preset"]))
    assert set(preset_names()) == offered and all(set(recipes) == offered for recipes in PRESETS.values())


def test_a_preset_fills_what_is_open_and_changes_nothing_that_was_given():
    for name in preset_names():
        given = {"learning_rate": 0.123, "target_modules": ["to_k"]}
        config = TrainConfig(preset=name, seed=3, **given)
        filled = with_preset(config, "a family without recipes of its own")
        assert {key: getattr(filled, key) for key in given} == given
        assert filled.max_train_steps > 0 and filled.train_batch_size > 0
        changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(filled, f.name)}
        assert changed == {"max_train_steps", "train_batch_size", "text_encoder_lr", "step_scaling"}


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({}, ("auto", "auto", "sensitivity")),
        ({"learning_rate": "auto", "text_encoder_lr": 1e-3}, ("auto", 1e-3, "sensitivity")),
        ({"learning_rate": "auto", "step_scaling": "none"}, ("auto", "auto", "none")),
        ({"learning_rate": 0.05}, (0.05, 2e-3, "none")),  # a number means what it always meant
        ({"learning_rate": 0.05, "step_scaling": "sensitivity"}, (0.05, 2e-3, "sensitivity")),
    ],
)
def test_steps_follow_from_the_base_unless_a_number_is_given(given, steps):
    for name in preset_names():
        for family in (*PRESETS, "another family"):
            filled = with_preset(TrainConfig(preset=name, **given), family)
            assert (filled.learning_rate, filled.text_encoder_lr, filled.step_scaling) == steps


def test_slower_presets_train_longer():
    for family in PRESETS:
        fast, balanced = (with_preset(TrainConfig(preset=name), family) for name in ("fast", "balanced"))
        assert fast.max_train_steps < balanced.max_train_steps


def test_a_run_is_definite_after_preparation(tmp_path):
    config = TrainConfig(preset="faithful", output_dir=str(tmp_path))
    prepared = prepare(config)
    assert (prepared.config.validation_steps, prepared.config.patience) == ("auto", 2)
    assert any(".ff." in name for name in prepared.targets["unet"])  # faithful trains every layer of toybox
    assert config.max_train_steps is None  # the given configuration is left as it was
