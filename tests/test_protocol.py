"""What is asked, and what the answers are worth, with features that can be computed by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.features import Features
from svfit_dreambooth.evaluation.protocol import (
    Answers,
    Questions,
    ask,
    bundled_questions,
    read_templates,
    score,
    subject_questions,
    subject_words,
)
from toybox.world import PHOTO_SETTINGS

RED, GREEN, BLUE = (Image.new("RGB", (2, 2), colour) for colour in ("red", "lime", "blue"))


def mean_colour(images):
    return torch.tensor(np.stack([np.asarray(image).reshape(-1, 3).mean(0) for image in images]))


def colour_of_text(texts):
    return torch.tensor([[float(word in text) for word in ("red", "green", "blue")] for text in texts])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a photo of sks dog", "sks dog"),
        ("a photo of a dog", "dog"),
        ("A painting of the old sks house", "old sks house"),
        ("photo of sks mug", "sks mug"),
        ("sks dog", "sks dog"),
        ("a sks dog", "sks dog"),
    ],
)
def test_the_subject_s_words_are_what_a_prompt_shows(prompt, words):
    assert subject_words(prompt) == words


def test_plain_prompts_name_the_class_with_one_article():
    questions = subject_questions([RED], "sks dog", "dog", ["a photo of {} in the snow", "the {} sleeps"], 2)
    assert questions.prompts == ["a photo of sks dog in the snow", "the sks dog sleeps"]
    assert questions.plain_prompts == ["a photo of a dog in the snow", "the dog sleeps"]
    assert questions.class_prompts == ["a photo of a dog"] * 2


def test_prompts_come_from_plain_lines_and_from_the_dataset_s_own(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\n\na photo of {} at home\n'a {0} {1} in the jungle'.format(unique_token, class_token),\n")
    assert read_templates(path) == ["a photo of {} at home", "a {} in the jungle"]
    path.write_text("'a {0} {1} in the jungle'.format(unique_token, class_token),\n", encoding="utf-8-sig")
    assert read_templates(path) == ["a {} in the jungle"]  # as editors on Windows write it


@pytest.mark.parametrize(("text", "reason"), [("a dog\n", "line 1"), ("# nothing\n", "no prompts"), (None, "read")])
def test_prompts_that_are_none_are_a_sentence(tmp_path, text, reason):
    path = tmp_path / "prompts.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SVFitError, match=reason):
        read_templates(path)


def test_toybox_asks_for_places_without_a_photo():
    questions = bundled_questions("dog_patch", pictures_per_prompt=2)
    assert len(questions.prompts) == 7 and len(questions.references) == 28
    assert not {want["setting"] for want in questions.wanted} & set(PHOTO_SETTINGS["dog_patch"])


def test_answers_are_sorted_and_seeds_count_up():
    questions = Questions(["p", "q"], ["p", "q"], ["c"], [RED], unrelated_prompts=["u", "v"], pictures_per_prompt=2)
    asked = []

    def paint(prompts, seed):
        asked.append((list(prompts), seed))
        return [Image.new("L", (1, 1), number) for number in range(len(prompts))]

    answers = ask(paint, questions, 7)
    assert asked == [(["p", "p", "q", "q", "c", "u", "v"], 7)]
    parts = (answers.subject, answers.of_class, answers.unrelated)
    assert [[image.getpixel((0, 0)) for image in part] for part in parts] == [[0, 1, 2, 3], [4], [5, 6]]


def test_scores_by_hand():
    questions = Questions(
        ["sks red thing", "sks green thing"], ["red thing", "green thing"], ["thing"], [RED, GREEN],
        wanted=[{"kind": "red"}, {"kind": "green"}], unrelated_prompts=["u", "v"], pictures_per_prompt=2,
    )  # fmt: skip
    answers = Answers([RED, RED, GREEN, BLUE], [BLUE], [RED, GREEN])
    untouched = Answers([BLUE] * 4, [BLUE], [RED, BLUE])

    def name_colours(images):
        return [{"kind": ("red", "green", "blue")[image.getpixel((0, 0)).index(255)]} for image in images]

    features = Features(mean_colour, mean_colour, colour_of_text, name_colours)
    scores = score(answers, untouched, questions, features)
    assert scores.subject == pytest.approx(3 / 8)  # of 4 x 2 pairs, red-red twice and green-green once
    assert scores.prompt == pytest.approx(3 / 4) and scores.right == pytest.approx(3 / 4)
    assert scores.drift == pytest.approx(1 / 2) and scores.preservation == pytest.approx(0.0)
    assert scores.diversity == pytest.approx(1 / 2)  # the two red ones agree, green and blue do not


def test_what_no_network_sees_is_none():
    questions = Questions(["p"], ["p"], ["c"], [RED], unrelated_prompts=["u"])
    answers = Answers([RED], [RED], [RED])
    scores = score(answers, answers, questions, Features(subject=mean_colour))
    assert scores.subject == pytest.approx(1.0) and scores.drift == pytest.approx(0.0)
    assert scores.prompt is scores.right is scores.diversity is None
