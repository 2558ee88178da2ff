"""What to ask an adapted model for, and what to say of its answers: the DreamBooth protocol.

Ruiz et al., "DreamBooth", 2022, section 4: pictures of the subject for prompts with its rare word, pictures of its
class without it; likeness, fit to the prompts, preservation of the class, diversity.  Drift is added to them: the
change of pictures that have nothing to do with the subject.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from svfit_dreambooth.bases.names import subject_kind
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.features import Features
from svfit_dreambooth.evaluation.metrics import diversity, drift, prompt_fidelity, subject_fidelity
from svfit_dreambooth.evaluation.reference import shown, true_pictures, unseen_settings

Paint = Callable[[Sequence[str], int], list[Image.Image]]  # prompts, seed of the first; one picture each, counting up

UNRELATED_PROMPTS = (
    "a photo of a red car in the snow",
    "a photo of a blue mug on a wooden table",
    "a photo of a green robot in the forest",
    "a photo of a yellow teapot on the beach",
    "a photo of a purple boat under water",
    "a photo of a white rocket in space",
)
TRUE_PICTURES = 4  # of a bundled subject in each setting
PROMPTS = (  # {} is the subject; the 25 of Ruiz et al. come from a file
    "a photo of {} on the beach",
    "a photo of {} in the snow",
    "a photo of {} on a wooden table",
    "a photo of {} in the forest",
    "a photo of {} in front of a city at night",
    "a photo of {} on a red carpet",
    "a photo of {} floating on water",
    "a photo of {} in a kitchen",
    "a watercolour painting of {}",
    "a pencil drawing of {}",
    "a photo of {} wearing a yellow hat",
    "a photo of {} beside a bicycle",
)


@dataclass
class Questions:
    """What a model is asked about one subject."""

    prompts: list[str]  # with its rare word
    plain_prompts: list[str]  # the same without it, as networks that see were taught to read
    class_prompts: list[str]
    references: list[Image.Image]  # real pictures of it
    wanted: list[dict[str, str]] | None = None  # for a judge: what each prompt names
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
    """What was measured, by the names in measures.py; None where no network was given for it."""

    subject: float | None = None  # DINO, CLIP-I, the judge's identity
    prompt: float | None = None  # CLIP-T, the judge
    right: float | None = None  # by a judge that names things
    drift: float | None = None
    preservation: float | None = None  # PRES
    diversity: float | None = None  # DIV; None: one picture of each prompt

    def known(self) -> dict[str, float]:
        """What was measured, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def bundled_questions(
    subject: str, words: str | None = None, *, pictures_per_prompt: int = 1, seed: int = 1000
) -> Questions:
    """A bundled subject in the settings of which it has no photo; references are true renderings in those settings.

    `words`: what stands for it in prompts; None: "sks" and its kind.
    """
    settings, kind = unseen_settings(subject), subject_kind(subject)
    plain = [f"a photo of a {kind} {place}" for place in settings.values()]
    return Questions(
        [f"a photo of {words or f'sks {kind}'} {place}" for place in settings.values()],
        plain,
        plain[:4],
        true_pictures(subject, list(settings), TRUE_PICTURES, seed),
        [shown(subject, setting) for setting in settings],
        pictures_per_prompt=pictures_per_prompt,
    )


def subject_questions(
    references: list[Image.Image],
    words: str,
    class_words: str,
    templates: Sequence[str] = PROMPTS,
    pictures_per_prompt: int = 4,
) -> Questions:
    """Any subject: `words` ("sks dog") and `class_words` ("dog") stand for {} in `templates`; `references` are photos."""
    return Questions(
        [template.replace("{}", words) for template in templates],
        [re.sub(r"(\b(?:an?|the) )?\{\}", lambda found: (found[1] or "a ") + class_words, t) for t in templates],
        [f"a photo of a {class_words}"] * pictures_per_prompt,
        references,
        pictures_per_prompt=pictures_per_prompt,
    )


def read_templates(path: Path) -> list[str]:
    """Prompts from a file, one a line, with {} for the subject's words.

    Lines of the DreamBooth dataset's own list, `'a {0} {1} in the jungle'.format(unique_token, class_token),`, mean
    the same.  Empty lines and lines that begin with # are passed over.  Raises SVFitError for a file that cannot be
    read or holds nothing, and for a line without {}.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SVFitError(
            f"the prompts {path} cannot be read ({error}): give a text file, one prompt a line."
        ) from error
    templates = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        formatted = re.match(r"""['"](.*)['"]\.format\(""", text)
        template = (formatted.group(1) if formatted else text).replace("{0} {1}", "{}")
        if "{}" not in template:
            raise SVFitError(f"line {number} of {path}, {text!r}, has no {{}} where the subject's words belong.")
        templates.append(template)
    if not templates:
        raise SVFitError(f"{path} holds no prompts: give one a line, such as 'a photo of {{}} on the beach'.")
    return templates


def subject_words(prompt: str) -> str:
    """What an instance or class prompt shows: "sks dog" of "a photo of sks dog", "dog" of "a photo of a dog"."""
    return re.sub(r"^((a|an|the|one)\s+)?([\w-]+\s+of\s+)?((a|an|the)\s+)?", "", prompt.strip(), flags=re.IGNORECASE)


def ask(paint: Paint, questions: Questions, seed: int) -> Answers:
    """Paints all answers; the pictures' seeds count on from `seed`: subject, class, unrelated."""
    prompts = [prompt for prompt in questions.prompts for _ in range(questions.pictures_per_prompt)]
    everything = paint([*prompts, *questions.class_prompts, *questions.unrelated_prompts], seed)
    first, second = len(prompts), len(prompts) + len(questions.class_prompts)
    return Answers(everything[:first], everything[first:second], everything[second:])


def score(answers: Answers, untouched: Answers, questions: Questions, features: Features) -> Scores:
    """Measures `answers`; `untouched` are the base's own, to the same questions with the same seeds."""
    scores = Scores()
    count = questions.pictures_per_prompt
    eyes = {see for see in (features.subject, features.picture) if see is not None}  # one, where CLIP is both
    seen = {see: see(answers.subject) for see in eyes}  # (n, d) each
    if features.subject is not None:
        real = features.subject(questions.references)  # (m, d)
        scores.subject = subject_fidelity(seen[features.subject], real)
        scores.preservation = subject_fidelity(features.subject(answers.of_class), real)
    if features.picture is not None and features.text is not None:
        texts = features.text(questions.plain_prompts).repeat_interleave(count, 0)  # (n, d)
        scores.prompt = prompt_fidelity(seen[features.picture], texts)
    if features.attributes is not None and questions.wanted is not None:
        wanted = [want for want in questions.wanted for _ in range(count)]
        scores.right = share_right(features.attributes(answers.subject), wanted)
    if features.any is not None:
        scores.drift = drift(features.any(answers.unrelated), features.any(untouched.unrelated))
        if count > 1:
            scores.diversity = diversity(seen[features.any].view(len(questions.prompts), count, -1))
    return scores


def share_right(found: Sequence[dict[str, str]], wanted: Sequence[dict[str, str]]) -> float:
    """Share of pictures in which everything that was `wanted` of them was `found`."""
    return float(np.mean([want.items() <= each.items() for want, each in zip(wanted, found, strict=True)]))
