"""Options from flags and YAML files."""

import pytest

from svfit_dreambooth.commands.arguments import OPTION_NAMES, REPLACED_FLAGS, parse_config
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig, config_to_yaml


def parse(*arguments):
    return parse_config(arguments, prog="train")


@pytest.fixture
def read(tmp_path):
    """A function of the text of a YAML file to the configuration."""

    def parsed(text, *flags):
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8-sig")
        return parse("--config", str(tmp_path / "run.yaml"), *flags)

    return parsed


def test_defaults_and_flags():
    assert parse() == TrainConfig()
    config = parse("--rank", "64", "--max-train-steps=7", "--center_crop", "--validation_prompts", "a", "b c")
    assert (config.rank_value, config.max_train_steps, config.center_crop) == (64, 7, True)
    assert config.validation_prompts == ["a", "b c"] and config.final_pictures
    assert not parse("--no_final_pictures").final_pictures and not parse("--center_crop", "false").center_crop
    assert (
        parse("--seed", "1", "--seed", "2").seed == 2 and parse("--instance_prompt", "null").instance_prompt == "null"
    )


def test_yaml_and_flags_combine(read):
    config = read(
        "learning_rate: 1e-3\nmixed_precision: no\nseed: 5\nvalidation_prompts: [one, two words]\nenergy:\n", "--seed=6"
    )
    assert (config.learning_rate, config.mixed_precision, config.seed) == (1e-3, "no", 6)
    assert config.validation_prompts == ["one", "two words"] and config.energy is None


def test_null_means_none_and_quoted_it_is_a_word(read):
    assert TrainConfig().checkpoints_total_limit == 3
    assert read("checkpoints_total_limit: null").checkpoints_total_limit is None
    assert read("checkpoints_total_limit:").checkpoints_total_limit is None
    config = read("learned_word: 'null'\ninstance_prompt: \"~\"\nadapter_name: ~")
    assert (config.learned_word, config.instance_prompt, config.adapter_name) == ("null", "~", None)
    with pytest.raises(SVFitError, match="seed is None, but must be a whole number"):
        read("seed: null")


def test_the_written_configuration_reads_back(read):
    config = TrainConfig(
        instance_prompt='a photo of "sks": dog',
        rank=32,
        random_flip=True,
        target_modules=["to_k", "to_v"],
        learning_rate=0.02,
        checkpoints_total_limit=None,
        learned_word="null",
        class_prompt="~",
        instance_data_dir="/photos/my dog",
    )
    assert read(config_to_yaml(config)) == config


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--learning_rate", "fast"], "learning_rate is 'fast', but must be a number"),
        (["--max_train_steps", "1.5"], "max_train_steps is '1.5', but must be a whole number"),
        (["--max_train_steps", "9" * 5000], r"max_train_steps is '9{20}... \(5000 characters\)', but must be a whole"),
        (["--mixed_precision", "fp8"], "mixed_precision is 'fp8', but must be no, fp16 or bf16"),
        (["--zzz", "1"], "unknown option --zzz: see train --help"),
        (["--max_train_step=5"], r"unknown option --max_train_step \(did you mean --max_train_steps\?\): see"),
        (["--instance_prompt", "a", "photo", "of"], "'photo of' belongs to no option, put text with spaces in quotes"),
        (["--center_crop", "maybe"], "center_crop is 'maybe', but must be true or false"),
        (["--energy"], "argument --energy: expected one argument: see train --help"),
        (["--use_8bit_adam"], "--use_8bit_adam has no place here: leave it out"),
        (["--num-train-epochs=3"], "--num_train_epochs has no place here: say how long to train with --max_train"),
        (["--network_dim", "32"], "--network_dim has no place here: use --rank, or leave it out"),
        (["--config", "/no/such.yaml"], "configuration /no/such.yaml cannot be read"),
    ],
)
def test_bad_flags_are_one_sentence(arguments, sentence):
    with pytest.raises(SVFitError, match=sentence) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not valid YAML"),
        ("just words", "must hold lines such as"),
        ("- seed: 1", "must hold lines such as"),
        ("model: {rank: 3}", "nests values under 'model'"),
        ("validation_prompts: [a, [b]]", "nests values under 'validation_prompts'"),
        ("validation_prompts: [{a: b}]", "nests values under 'validation_prompts'"),
        ("[seed]: 1", "nests values under 'a name'"),
        ("validation_prompts: " + "[" * 5000, "is nested too deeply|is not valid YAML"),
        ("validation_prompts: &a [*a]", "nests values under 'validation_prompts'|is not valid"),
        ("seed: [1, 2]", "seed is a list, but takes one value"),
        ("seed: 1\nseed: 2", "gives seed twice"),
        ("max train step: 5", "unknown option 'max train step' .did you mean --max_train_steps"),
        ("train_data_dir: photos", "--train_data_dir has no place here: name the photos with --instance_data_dir"),
        ("seed: !!python/object:os.system 1", "seed is|is not valid|^$"),
    ],
)
def test_bad_yaml_is_one_sentence(read, text, sentence):
    if text.startswith("seed: !!"):  # a tag is no more than a word before the value, and nothing is made of it
        assert read(text).seed == 1
        return
    with pytest.raises(SVFitError, match=sentence) as error:
        read(text)
    assert "\n" not in str(error.value)


def test_replaced_flags_are_none_of_ours_and_speak_of_ours():
    assert not set(REPLACED_FLAGS) & set(OPTION_NAMES)
    for advice in REPLACED_FLAGS.values():
        if advice.startswith("use "):
            assert any(name in advice for name in OPTION_NAMES), advice


def test_help_is_grouped_and_names_every_option_with_dashes(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for group in ("base model:", "photos and words:", "what is trained:", "optimization:", "seeing how it goes:"):
        assert group in text
    assert all(f"--{name}" in text for name in OPTION_NAMES)
    assert "unless --dino_path or --clip_path is given" in text
