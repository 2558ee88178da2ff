"""Folders of photos as subjects: names, words, and what is refused."""

import pytest
from PIL import Image

from svfit_dreambooth import TrainConfig, read_adapter
from svfit_dreambooth.commands.main import main_train
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.subjects.configs import subject_configs, subject_folders


@pytest.fixture
def folder(tmp_path):
    """A function that makes a folder of one photo, with words of its own if given."""

    def make(path, words=None, caption=None):
        made = tmp_path / "subjects" / path
        made.mkdir(parents=True)
        Image.new("RGB", (32, 32), (200, 30, len(path) * 9)).save(made / "a.png")
        if words is not None:
            (made / "subject.yaml").write_text(words, encoding="utf-8")
        if caption is not None:
            (made / "a.txt").write_text(caption)
        return made

    return make


def words_of(config):
    return config.instance_prompt


def test_names_and_words(folder, tmp_path):
    folder("10_sks dog")
    folder("cat")
    folder("zwx mug")
    folder("said", "instance_prompt: a drawing of a car\nlearned_word: car\nvalidation_prompts: [a car, a red car]\n")
    folder("told", caption="a cat in snow")
    (tmp_path / "subjects" / ".hidden").mkdir()
    (tmp_path / "subjects" / "notes.txt").write_text("mine")
    found = subject_folders(tmp_path / "subjects")
    configs, refused = subject_configs(found, TrainConfig(output_dir="OUT"))
    assert not refused
    assert {config.adapter_name: words_of(config) for config in configs} == {
        "10_sks-dog": "sks dog",
        "cat": "a photo of sks cat",
        "said": "a drawing of a car",
        "told": None,
        "zwx-mug": "a photo of zwx mug",
    }
    said = configs[2]
    assert said.learned_word == "car" and said.validation_prompts == ["a car", "a red car"]
    assert {config.output_dir for config in configs} >= {"OUT/cat", "OUT/zwx-mug"}
    configs, _ = subject_configs(found, TrainConfig(instance_prompt="a picture of {} in snow"))
    assert [words_of(config) for config in configs[:2]] == ["a picture of sks dog in snow", "a picture of cat in snow"]


def test_two_of_one_name_and_two_of_one_word(folder, caplog):
    first, second, third = folder("one/my dog"), folder("two/My-dog"), folder("two/cat")
    configs, refused = subject_configs([first, second, third], TrainConfig(instance_prompt="a photo of sks"))
    assert [config.adapter_name for config in configs] == ["my-dog", "cat"]
    (bad,) = refused
    assert bad.name == "My-dog" and f"is called like {first}: rename one of them." in bad.message
    assert "my-dog, cat are all called 'a photo of sks'" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("- a\n", "must hold lines such as"),
        ("rank: 4\n", "has 'rank', but a subject has instance_prompt, "),
        ("instance_prompt: [a, b]\n", "as instance_prompt, which is a text"),
        ("validation_prompts: a\n", "as validation_prompts, which is a list of texts"),
        ("instance_prompt: 'a\n", "cannot be read"),
    ],
)
def test_bad_words_are_refused_by_name(folder, words, message):
    configs, (bad,) = subject_configs([folder("dog", words), folder("cat")], TrainConfig())
    assert [config.adapter_name for config in configs] == ["cat"]
    assert bad.name == "dog" and "subject.yaml" in bad.message and message in bad.message


def test_folders_that_hold_no_subjects(tmp_path):
    with pytest.raises(SVFitError, match="holds no folders"):
        subject_folders(tmp_path)
    with pytest.raises(SVFitError, match="cannot be read"):
        subject_folders(tmp_path / "none")
    with pytest.raises(SVFitError, match="adapter_name is for one subject, and there are 2"):
        subject_configs(["a", "b"], TrainConfig(adapter_name="x"))


def test_the_command(tiny_base, folder, tmp_path, capsys):
    folder("dog", "instance_prompt: a photo of sks dog\n")
    folder("cat")
    (tmp_path / "subjects" / "none").mkdir()
    command = [
        *("--subjects", str(tmp_path / "subjects"), "--output_dir", str(tmp_path / "out")),
        *("--pretrained_model_name_or_path", str(tiny_base), "--max_train_steps", "1", "--resolution", "16"),
        *("--train_batch_size", "1", "--validation_steps", "0", "--no_final_pictures", "--fixed_loss_examples", "0"),
    ]
    assert main_train(command) == 2
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert [line.partition(" after")[0] for line in lines[:2]] == ["cat: finished", "dog: finished"]
    assert lines[2].startswith("none: failed: ") and "1 of 3 subjects failed" in told.err
    assert read_adapter(tmp_path / "out" / "dog" / "dog.safetensors").instance_prompt == "a photo of sks dog"
    assert main_train([*command[2:], "--instance_data_dir", "a", "--instance_data_dir", "b", "--dry_run"]) == 0
    assert "There is no folder 'a'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--subjects", "a", "--instance_data_dir", "b"], "--subjects and --instance_data_dir both name photos"),
        (["--subjects", "a", "--subjects_at_once", "0"], "cannot be read"),
        (
            ["--instance_data_dir", "b", "--subjects_at_once", "2"],
            "--subjects_at_once goes with several subjects alone",
        ),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    assert main_train(arguments) == 2
    assert message in capsys.readouterr().err
