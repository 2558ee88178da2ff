"""Runs whose steps follow from the base: from options to the adapter, going on, and several processes."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svfit_dreambooth.adapter.file import read_adapter
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training import checkpoints
from svfit_dreambooth.training import sensitivity as room
from svfit_dreambooth.training.checkpoints import list_checkpoints
from svfit_dreambooth.training.config import TrainConfig, config_to_yaml
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.loop import Loop
from svfit_dreambooth.training.run import train


@pytest.fixture
def config(tiny_base, photo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "PICTURES", 1)
    monkeypatch.setattr(room, "STEPS", 1)
    monkeypatch.setattr(room, "PASSES", 3)
    return {
        "pretrained_model_name_or_path": str(tiny_base),
        "instance_data_dir": str(photo_folder),
        "instance_prompt": "a photo of sks dog",
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 4,
        "train_batch_size": 2,
        "resolution": 16,
        "fixed_loss_examples": 0,
        "final_pictures": False,
        "validation_steps": 0,
        "save_dtype": "float32",
        "checkpointing_steps": 2,
    }


def shifts(result):
    return read_adapter(result.adapter_path).shifts


def same(first, second):
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def doings(config):
    return [event.doing for event in RunFolder(config["output_dir"]).events() if event.name == "phase"]


def test_by_default_values_move_by_what_the_base_says_of_them(config):
    """The first step of Adam moves every value by its rate times its scale, whatever its gradient."""
    result = train(TrainConfig(**config | {"max_train_steps": 1}, lr_scheduler="constant", train_text_encoder=True))
    assert any(doing.startswith("measuring how much each value matters") for doing in doings(config))
    record = read_adapter(result.adapter_path).training
    assert record["step_scaling"] == "sensitivity" and record["learning_rate"] > 0
    every = torch.cat(list(shifts(result).values())).abs()
    moved = every[every > 0]
    assert len(moved) > 0.9 * len(every)
    assert moved.max() / moved.min() > 2  # not equal steps
    assert moved.mean().item() == pytest.approx(record["learning_rate"], rel=0.15)  # but for those that never matter


def test_a_number_means_plain_equal_steps_and_measures_nothing(config):
    result = train(TrainConfig(**config | {"max_train_steps": 1}, lr_scheduler="constant", learning_rate=0.03))
    moved = torch.cat(list(shifts(result).values())).abs()
    equal = (moved - 0.03).abs() < 3e-4  # but for gradients as small as AdamW's epsilon
    assert equal.double().mean() > 0.95
    assert not any("matters" in doing for doing in doings(config))
    record = read_adapter(result.adapter_path).training
    assert record["learning_rate"] == 0.03 and "step_scaling" not in record


def test_a_run_goes_on_with_the_steps_of_its_checkpoint(config, tmp_path, monkeypatch):
    """Also where what was measured has gone and measuring again would find something else."""
    options = {**config, "budget": 40}
    whole = train(TrainConfig(**{**options, "output_dir": str(tmp_path / "whole")}))
    train(TrainConfig(**options), on_step=lambda step: step.step == 2)
    monkeypatch.setattr("svfit_dreambooth.training.run.base_sensitivity", None)  # never called again
    again = train(TrainConfig(**options, resume_from_checkpoint="latest"))
    assert same(shifts(again), shifts(whole))
    first, second = (read_adapter(result.adapter_path).training for result in (whole, again))
    assert first["learning_rate"] == second["learning_rate"]


def as_earlier(path):
    """Rewrites a checkpoint as versions wrote it that knew nothing of scaled steps."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    identity, facts = json.loads(metadata["identity"]), json.loads(metadata["state"])
    del identity["step_scaling"], facts["rates"]
    metadata |= {"identity": json.dumps(identity), "state": json.dumps(facts)}
    metadata["sha256"] = checkpoints._checksum(tensors, metadata)
    save_file(tensors, path, metadata)


def test_earlier_checkpoints_and_config_files_go_on_by_their_own_rule(config, tmp_path):
    options = {**config, "learning_rate": 0.05}
    whole = train(TrainConfig(**{**options, "output_dir": str(tmp_path / "whole")}))
    train(TrainConfig(**options), on_step=lambda step: step.step == 2)
    (path,) = list_checkpoints(RunFolder(config["output_dir"]).checkpoints)
    as_earlier(path)
    with pytest.raises(SVFitError, match="was made with learning_rate 0.05, not auto: use the same options"):
        train(TrainConfig(**config, resume_from_checkpoint="latest"))
    with pytest.raises(SVFitError, match="was made with step_scaling none, not sensitivity"):
        train(TrainConfig(**options, step_scaling="sensitivity", resume_from_checkpoint="latest"))
    assert same(shifts(train(TrainConfig(**options, resume_from_checkpoint="latest"))), shifts(whole))


def test_the_configuration_of_a_run_repeats_it(config, tmp_path):
    from svfit_dreambooth.commands.arguments import parse_config

    first = train(TrainConfig(**config))
    text = RunFolder(config["output_dir"]).config.read_text()
    assert "learning_rate: auto" in text and "step_scaling: sensitivity" in text
    assert text == config_to_yaml(first.plan.config)
    file = tmp_path / "config.yaml"
    file.write_text(text)
    again = train(parse_config(["--config", str(file), "--output_dir", str(tmp_path / "again")], "train"))
    assert same(shifts(again), shifts(first))


def test_scaled_values_are_few_groups_of_the_optimizer(config, monkeypatch):
    run, seen = Loop.run, []

    def note(self, *args):
        seen.extend((len(group["params"]), len(group["scales"])) for group in self.optimizer.inner.param_groups)
        return run(self, *args)

    monkeypatch.setattr(Loop, "run", note)
    train(TrainConfig(**config | {"max_train_steps": 1}, train_text_encoder=True, learned_word="sks"))
    assert seen == [(40, 40), (1, 1)]  # all singular values, and the word
