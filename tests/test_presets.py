"""Recipes for what was left open."""

import pytest

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig, parse_config
from svfit_dreambooth.training.plan import prepare
from svfit_dreambooth.training.presets import PRESETS, apply_preset, preset_names


def test_a_preset_fills_what_was_left_open_and_nothing_else():
    for family, recipes in PRESETS.items():
        assert list(recipes) == preset_names()
        for name, values in recipes.items():
            config = TrainConfig(preset=name)
            apply_preset(config, family)
            assert {key: getattr(config, key) for key in values} == values
    config = TrainConfig(preset="fast", learning_rate=0.123)
    apply_preset(config, "a family without recipes of its own")
    assert config.learning_rate == 0.123
    assert config.max_train_steps == PRESETS["stable-diffusion"]["fast"]["max_train_steps"]


def test_presets_name_options_that_exist_and_are_open_by_default():
    for recipes in PRESETS.values():
        for values in recipes.values():
            assert all(getattr(TrainConfig(), key) is None for key in values)
            TrainConfig(**values)  # and no value is refused


def test_a_run_is_definite_after_preparation(tmp_path):
    config = parse_config(["--preset", "fast", "--output_dir", str(tmp_path)], prog="train")
    run = prepare(config)
    assert run.config.max_train_steps == PRESETS["toybox"]["fast"]["max_train_steps"]
    assert run.config.validation_steps == run.config.max_train_steps // 4
    assert config.max_train_steps is None  # the given configuration is left as it was


def test_an_unknown_preset_is_a_sentence(tmp_path):
    with pytest.raises(SVFitError, match="--preset is 'slow', but must be one of: fast, balanced, faithful, style"):
        prepare(TrainConfig(preset="slow", output_dir=str(tmp_path)))


def test_faithful_trains_every_layer_of_toybox_unless_told_otherwise():
    for given, expected in ((None, ["all"]), (["to_k"], ["to_k"])):
        config = TrainConfig(preset="faithful", target_modules=given)
        apply_preset(config, "toybox")
        assert config.target_modules == expected
