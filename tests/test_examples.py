"""Photos and captions as training sees them."""

import shutil

import pytest
import torch

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.examples import encode_examples

CPU = torch.device("cpu")


@pytest.fixture
def folder(photo_folder, tmp_path):
    """Photos of which the first has two captions, the second one, and the third none."""
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder, folder)
    (folder / "photo 0.txt").write_text("sks dog, red, snow\nsks dog by day")
    (folder / "photo 1.txt").write_text("a photo of sks dog")
    return folder


def test_every_caption_is_encoded_once(tiny_run, folder):
    examples = encode_examples(tiny_run(instance_data_dir=str(folder)), CPU)
    assert examples.prompts == [[0, 1], [2], [2]]
    assert (
        len(examples.conditions["prompt_embeds"]) == len(examples.tokens["text_encoder"]) == 3
        and examples.dropped is None
    )


def test_orders_of_tags_and_the_empty_prompt_are_encoded_too(tiny_run, folder):
    run = tiny_run(instance_data_dir=str(folder), shuffle_caption=True, caption_dropout_rate=0.1)
    examples = encode_examples(run, CPU)
    first, *others = examples.prompts
    assert len(first) == 3 and others == [[3], [3]]  # two orders of the tags behind the first, and the plain sentence
    assert examples.dropped == 4 and len(examples.conditions["prompt_embeds"]) == 5
    empty = run.base.pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids[0]
    assert torch.equal(examples.tokens["text_encoder"][examples.dropped], empty)


def test_folders_of_several_counts_are_one_run(tiny_run, photo_folder, tmp_path):
    for count, photo in ((20, 0), (20, 1), (10, 2)):
        (tmp_path / "all" / f"{count}_sks dog").mkdir(parents=True, exist_ok=True)
        shutil.copy(photo_folder / f"photo {photo}.png", tmp_path / "all" / f"{count}_sks dog")
    examples = encode_examples(tiny_run(instance_data_dir=str(tmp_path / "all"), instance_prompt=None), CPU)
    assert examples.repeats == [1, 2, 2] and len(examples.conditions["prompt_embeds"]) == 1


def test_a_folders_own_name_may_be_the_instance_prompt(tiny_run, photo_folder, tmp_path):
    shutil.copytree(photo_folder, tmp_path / "10_sks dog")
    run = tiny_run(instance_data_dir=str(tmp_path / "10_sks dog"), instance_prompt=None)
    assert run.config.instance_prompt == "sks dog"
    run = tiny_run(instance_data_dir=str(tmp_path / "10_sks dog"), instance_prompt="a photo of sks dog")
    assert run.config.instance_prompt == "a photo of sks dog"
    with pytest.raises(SVFitError, match="instance_prompt is missing"):
        tiny_run(instance_data_dir=str(photo_folder), instance_prompt=None)
