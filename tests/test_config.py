"""Options from flags, YAML and Python."""

import logging

import pytest

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig, config_to_yaml, parse_config


def parse(*arguments):
    return parse_config(arguments, prog="train")


def test_defaults_and_flags():
    assert parse() == TrainConfig()
    config = parse("--rank", "64", "--max_train_steps", "7", "--center_crop", "--validation_prompts", "a", "b c")
    assert (config.rank_value, config.max_train_steps, config.center_crop) == (64, 7, True)
    assert config.validation_prompts == ["a", "b c"]
    assert parse("--rank", "full").rank_value == "full" == TrainConfig(rank="full").rank_value
    assert TrainConfig(rank=8).rank_value == 8


def test_yaml_and_flags_combine(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 1e-3\nmixed_precision: no\nseed: 5\nvalidation_prompts: [one, two words]\nenergy:\n"
    )
    config = parse("--config", str(file), "--seed", "6")
    assert (config.learning_rate, config.mixed_precision, config.seed) == (1e-3, "no", 6)
    assert config.validation_prompts == ["one", "two words"] and config.energy is None


def test_the_written_configuration_reads_back(tmp_path):
    config = TrainConfig(
        instance_prompt='a photo of "sks": dog',
        rank=32,
        random_flip=True,
        target_modules=["to_k", "to_v"],
        learning_rate=0.02,
        instance_data_dir="/photos/my dog",
    )
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config))
    assert parse("--config", str(file)) == config


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rank", "0"], "--rank is '0': give a whole number of 1 or more"),
        (["--rank", "half"], "--rank is 'half'"),
        (["--energy", "2"], "--energy is 2.0"),
        (["--energy", "0.9", "--rank", "64"], "--energy chooses the ranks itself: leave --rank out"),
        (["--learning_rate", "0"], "--learning_rate is 0.0: it must be above 0"),
        (["--learning_rate", "fast"], "argument --learning_rate.*fast"),
        (["--adam_beta1", "1.5"], "--adam_beta1 is 1.5: it is a decay, from 0 to below 1"),
        (["--adam_beta2", "1"], "--adam_beta2 is 1.0"),
        (["--adam_weight_decay", "-0.1"], "--adam_weight_decay is -0.1: it cannot be negative"),
        (["--adam_epsilon", "0"], "--adam_epsilon is 0.0: it must be above 0"),
        (["--max_train_steps", "0"], "--max_train_steps is 0"),
        (["--resolution", "-1"], "--resolution is -1"),
        (["--mixed_precision", "fp8"], "fp8"),
        (["--nonsense", "1"], "unknown option --nonsense"),
        (["--max_train_step=5"], r"unknown option --max_train_step \(did you mean --max_train_steps\?\): see"),
        (["--instance_prompt", "a", "photo", "of"], "'photo of' belongs to no option, put text with spaces in quotes"),
        (["--center_crop", "maybe"], r"--center_crop.*\(case insensitive\): see"),
        (["--use_8bit_adam"], "--use_8bit_adam has no place here: leave it out"),
        (["--num-train-epochs=3"], "--num_train_epochs has no place here: say how long to train with"),
        (["--config", "/no/such.yaml"], "configuration /no/such.yaml cannot be read"),
    ],
)
def test_bad_options_are_one_sentence(arguments, sentence):
    with pytest.raises(SVFitError, match=sentence):
        parse(*arguments)


def test_a_typo_in_yaml_is_pointed_out(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max train step: 5\n", encoding="utf-8-sig")
    with pytest.raises(SVFitError, match="--max train step .did you mean --max_train_steps"):
        parse("--config", str(file))


@pytest.mark.parametrize("text", ["a: [", "just words", "model: {rank: 3}"])
def test_bad_yaml_is_one_sentence(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SVFitError, match="the configuration .*run.yaml"):
        parse("--config", str(file))


def test_values_of_a_lora_command_are_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        TrainConfig(rank=4, learning_rate=1e-4).warn_of_lora_values()
    assert "--rank 4 trains only 4 numbers" in caplog.text and "--learning_rate 0.0001" in caplog.text
    caplog.clear()
    TrainConfig().warn_of_lora_values()
    assert not caplog.records


def test_help_is_grouped(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for group in ("base model:", "photos and words:", "what is trained:", "optimization:", "output:"):
        assert group in text


def test_help_can_be_read(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "seeing how it goes" in text and all(f"--{name}" in text for name in ("preset", "budget", "also", "keep"))
