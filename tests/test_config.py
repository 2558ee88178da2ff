"""What a configuration refuses, from wherever its values come."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import get_type_hints

import diffusers.optimization
import pytest

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.limits import plain_type
from svfit_dreambooth.training.options import Schedule


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"save_dtype": "bfloat16"}, "save_dtype is 'bfloat16', but must be float16 or float32"),
        ({"keep": "bets"}, "keep is 'bets', but must be best or last"),
        ({"aspect_ratio": "sqare"}, "aspect_ratio is 'sqare', but must be keep or square"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8', but must be no, fp16 or bf16"),
        ({"mixed_precision": False}, "mixed_precision is False"),
        ({"preset": "slow"}, "preset is 'slow', but must be fast, balanced, faithful or style"),
        ({"also": "zip"}, "also is 'zip', but must be kohya or diffusers"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler is 'piecewise_constant'"),
        ({"rank": "0"}, "rank is '0': give a whole number of 1 or more"),
        ({"rank": "half"}, "rank is 'half'"),
        ({"rank": "9" * 5000}, "rank is '9"),
        ({"rank": True}, "rank is True"),
        ({"energy": 2.0}, "energy is 2.0: it must be above 0 and at most 1"),
        ({"energy": 0.9, "rank": "64"}, "energy chooses the ranks itself: leave rank out"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be above 0"),
        ({"learning_rate": 1e38}, "learning_rate is 1e.38: it must be above 0 and at most 1,000"),
        ({"adam_beta1": 1.5}, "adam_beta1 is 1.5: it must be 0 or more and below 1"),
        ({"adam_weight_decay": -0.1}, "adam_weight_decay is -0.1: it must be 0 or more"),
        ({"max_train_steps": 0}, "max_train_steps is 0: it must be 1 or more"),
        ({"max_train_steps": 10**30}, "max_train_steps is 10{30}: it must be 1 or more and at most 1,000,000,000"),
        ({"max_train_steps": 10.0}, "max_train_steps is 10.0, but must be a whole number"),
        ({"max_train_steps": True}, "max_train_steps is True, but must be a whole number"),
        ({"resolution": 10**8}, "resolution is 100000000"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit is 0: it must be 1 or more"),
        ({"fixed_loss_examples": -1}, "fixed_loss_examples is -1"),
        ({"center_crop": "no"}, "center_crop is 'no', but must be true or false"),
        ({"instance_prompt": "dog \udcff"}, r"instance_prompt is 'dog \\udcff', which is no Unicode text"),
        ({"output_dir": "a\0b"}, r"output_dir is 'a\\x00b', and no text has a zero byte"),
        ({"validation_prompts": "a dog"}, "validation_prompts is 'a dog', but must be a list of texts"),
        ({"validation_prompts": ["a dog", 3]}, "validation_prompts is 3, but must be a text"),
        ({"seed": None}, "seed is None, but must be a whole number"),
    ],
)
def test_values_that_no_run_could_use(options, sentence):
    with pytest.raises(SVFitError, match=sentence) as error:
        TrainConfig(**options)
    assert "--" not in str(error.value)


def test_every_number_has_limits_and_none_may_be_infinite():
    kinds = get_type_hints(TrainConfig)
    numbers = [f.name for f in dataclasses.fields(TrainConfig) if plain_type(kinds[f.name])[0] in (int, float)]
    assert len(numbers) > 25
    for name in numbers:
        for value in (-1, -0.5, math.nan, math.inf, -math.inf, 10**9999 if kinds[name] is int else "1"):
            with pytest.raises(SVFitError, match=f"^{name} is"):
                TrainConfig(**{name: value})


def test_schedules_are_those_of_diffusers_that_need_no_rules():
    theirs = {kind.value for kind in diffusers.optimization.SchedulerType}
    assert set(Schedule.__args__) == theirs - {"piecewise_constant"}


def test_paths_begin_at_home_and_may_be_path_objects(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig(output_dir="~/runs/dog", instance_data_dir=Path("~"), instance_prompt="~/no path")
    assert config.output_dir == str(tmp_path / "runs" / "dog") and config.instance_data_dir == str(tmp_path)
    assert config.instance_prompt == "~/no path" and TrainConfig(output_dir="~~").output_dir == "~~"


def test_rank_is_a_number_or_full():
    assert TrainConfig(rank=8).rank_value == TrainConfig(rank="8").rank_value == 8
    assert TrainConfig().rank_value == "full"


def test_values_of_a_lora_command_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        TrainConfig(rank=4, learning_rate=1e-4).warn_of_lora_values()
    assert "rank 4 trains only 4 numbers" in caplog.text and "learning_rate 0.0001" in caplog.text
    caplog.clear()
    TrainConfig().warn_of_lora_values()
    assert not caplog.records
