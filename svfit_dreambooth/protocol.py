"""What to ask an adapted model for, and what to say of its answers: the DreamBooth protocol.

Ruiz et al., "DreamBooth", 2022, section 4: pictures of the subject for prompts with its rare word, pictures of its
class without it; likeness, fit to the prompts, preservation of the class, diversity.  Drift is added to them: the
change of pictures that have nothing to do with the subject.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from svfit_dreambooth.evaluation import diversity, drift, prompt_fidelity, subject_fidelity
from svfit_dreambooth.features import Features
from svfit_dreambooth.validation import UNRELATED_PROMPTS

Paint = Callable[[Sequence[str], int], list[Image.Image]]  # prompts, seed of the first; one picture each, counting up

TRUE_PICTURES = 4  # of a toybox subject in each setting


@dataclass
class Questions:
    """What a model is asked about one subject."""

    prompts: list[str]  # with its rare word
    plain_prompts: list[str]  # the same without it, as networks that see were taught to read
    class_prompts: list[str]
    references: list[Image.Image]  # real pictures of it
    wanted: list[dict[str, str]] | None = None  # toybox: the attributes that each prompt names
    unrelated_prompts: Sequence[str] = UNRELATED_PROMPTS
    pictures_per_prompt: int = 1


@dataclass
class Answers:
    """The pictures; of the subject, `pictures_per_prompt` for each prompt in turn."""

    subject: list[Image.Image]
    of_class: list[Image.Image]
    unrelated: list[Image.Image]


@dataclass
class Scores:
    """What was measured; None where no network was given for it."""

    subject: float | None = None  # likeness to the references, mean cosine: DINO, CLIP-I, the judge's identity
    prompt: float | None = None  # fit to the prompts, mean cosine: CLIP-T, the judge
    right: float | None = None  # toybox: share of pictures with everything that the prompt names
    drift: float | None = None  # change of unrelated pictures against the base's, 0 is none
    preservation: float | None = None  # PRES: likeness of *class* pictures to the references, lower is better
    diversity: float | None = None  # DIV: difference of pictures of one prompt; None: one picture each


def toybox_questions(subject: str, pictures_per_prompt: int = 1, seed: int = 1000) -> Questions:
    """A bundled subject in the settings of which it has no photo; references are true renderings in those settings."""
    from toybox.world import PHOTO_SETTINGS, SETTING_PHRASES, SUBJECTS, render, sample_scene

    individual = SUBJECTS[subject]
    places = [place for place in SETTING_PHRASES if place not in PHOTO_SETTINGS[subject]]
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, individual, place, "photo") for place in places for _ in range(TRUE_PICTURES)]
    plain = [f"a photo of a {individual.kind} {SETTING_PHRASES[place]}" for place in places]
    return Questions(
        [f"a photo of sks {individual.kind} {SETTING_PHRASES[place]}" for place in places],
        plain,
        plain[:4],
        [render(scene) for scene in scenes],
        [{"kind": individual.kind, "setting": place} for place in places],
        pictures_per_prompt=pictures_per_prompt,
    )


def ask(paint: Paint, questions: Questions, seed: int) -> Answers:
    """Paints all answers; the first picture of every kind of prompt has the seed `seed`."""
    prompts = [prompt for prompt in questions.prompts for _ in range(questions.pictures_per_prompt)]
    everything = paint([*prompts, *questions.class_prompts, *questions.unrelated_prompts], seed)
    first, second = len(prompts), len(prompts) + len(questions.class_prompts)
    return Answers(everything[:first], everything[first:second], everything[second:])


def score(answers: Answers, untouched: Answers, questions: Questions, features: Features) -> Scores:
    """Measures `answers`; `untouched` are the base's own, to the same questions with the same seeds."""
    scores = Scores()
    count = questions.pictures_per_prompt
    if features.subject is not None:
        real = features.subject(questions.references)  # (m, d)
        scores.subject = subject_fidelity(features.subject(answers.subject), real)
        scores.preservation = subject_fidelity(features.subject(answers.of_class), real)
    if features.picture is not None and features.text is not None:
        texts = features.text(questions.plain_prompts).repeat_interleave(count, 0)  # (n, d)
        scores.prompt = prompt_fidelity(features.picture(answers.subject), texts)
    if features.attributes is not None and questions.wanted is not None:
        wanted = [want for want in questions.wanted for _ in range(count)]
        found = features.attributes(answers.subject)
        scores.right = float(np.mean([want.items() <= each.items() for want, each in zip(wanted, found, strict=True)]))
    if features.any is not None:
        scores.drift = drift(features.any(answers.unrelated), features.any(untouched.unrelated))
        if count > 1:
            seen: Tensor = features.any(answers.subject)  # (prompts * count, d)
            scores.diversity = diversity(seen.view(len(questions.prompts), count, -1))
    return scores
