"""Adapters to scores: paints what the protocol asks for, with and without each adapter, and measures it."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from svfit_dreambooth.adapter.file import read_adapter
from svfit_dreambooth.adapter.source import distinct_names, find_adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import bundled_subject
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation import measures
from svfit_dreambooth.evaluation.features import Features
from svfit_dreambooth.evaluation.protocol import (
    PROMPTS,
    Answers,
    Questions,
    Scores,
    ask,
    bundled_questions,
    score,
    subject_questions,
    subject_words,
)
from svfit_dreambooth.files import check_output, save_png, write_atomically
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.painting.loading import merge_adapters, set_adapters
from svfit_dreambooth.painting.picture import free_path, save_picture
from svfit_dreambooth.painting.sheets import contact_sheet
from svfit_dreambooth.photos.reading import find_photos, open_photo

BASE = "base"
COLUMNS = 8  # pictures in a row of the sheet


@dataclass
class Candidate:
    """An adapter, and the photos of the subject that it should have learnt."""

    path: Path
    strength: float
    photos: Path
    words: str | None = None  # what stands for the subject in prompts; None: from the adapter's instance prompt
    class_words: str | None = None  # None: from its class prompt, else the last of `words`


@dataclass
class Row:
    """The scores of one adapter on one subject; `adapter` is BASE for the untouched base."""

    adapter: str
    strength: float
    subject: str
    scores: Scores


def evaluate_adapters(
    model: BaseModel,
    candidates: Sequence[Candidate],
    features: Features,
    output_dir: Path,
    *,
    templates: Sequence[str] | None = None,
    num_images: int = 4,
    seed: int = 0,
    on_row: Callable[[Row], None] | None = None,
    **painting: Any,
) -> list[Row]:
    """One row for the base on every subject, then one for every candidate, in the order given.

    `model` carries the `adapter_files` of the candidates, in that order, each once however many strengths it has.
    `templates`: None takes the settings without a photo for a bundled subject, compared with true
    renderings, else `PROMPTS`, compared with the photos.  `painting`: options of `generate`. Writes into `output_dir`:
    scores.json, sheet.png, and every picture with its settings under pictures/. Raises SVFitError where nothing can be
    measured, for photos that cannot be used, and where an earlier evaluation is.
    """
    if features.any is None:
        raise SVFitError("nothing can be measured: name a DINO and a CLIP model with dino_path and clip_path.")
    if (output_dir / "scores.json").exists():
        raise SVFitError(f"{output_dir} holds the scores of an earlier evaluation: name another folder.")
    check_output(output_dir / "sheet.png", ".png")
    candidates = [dataclasses.replace(candidate, path=find_adapter(candidate.path)) for candidate in candidates]
    files = adapter_files(candidate.path for candidate in candidates)
    names = dict(zip(files, distinct_names(file.stem for file in files), strict=True))  # as `open_for_adapters` does
    _, *labels = distinct_names([BASE, *(names[candidate.path] for candidate in candidates)], names.values())
    rows: list[Row] = []
    sheet: list[tuple[str, list[Image.Image]]] = []
    captions: list[str] = []
    asked: dict[tuple[str, ...], Answers] = {}

    def answer(label: str, strengths: dict[str, float], questions: Questions) -> Answers:
        set_adapters(model.pipeline, strengths)

        def paint(prompts: Sequence[str], first: int) -> list[Image.Image]:
            images = []
            for number, prompt in enumerate(prompts):
                (picture,) = generate(model, [prompt], seed=first + number, **painting)
                save_picture(picture, free_path(output_dir / "pictures" / label, "picture"))
                images.append(picture.image)
            return images

        with merge_adapters(model.pipeline):
            return ask(paint, questions, seed)

    def note(label: str, strength: float, subject: str, answers: Answers, base: Answers, questions: Questions) -> None:
        rows.append(Row(label, strength, subject, score(answers, base, questions, features)))
        sheet.append((f"{subject}: {label}", answers.subject[:: questions.pictures_per_prompt][:COLUMNS]))
        if on_row is not None:
            on_row(rows[-1])

    for candidate, label in zip(candidates, labels, strict=True):
        questions = _questions(candidate, model, templates, num_images)
        subject = candidate.photos.resolve().name
        key = (subject, *questions.prompts)
        if key not in asked:
            captions = questions.prompts[:COLUMNS]
            sheet.append((f"{subject}: photos", questions.references[:COLUMNS]))
            asked[key] = answer(f"base-{subject}", {}, questions)
            note(BASE, 0.0, subject, asked[key], asked[key], questions)
        answers = answer(label, {names[candidate.path]: candidate.strength}, questions)
        note(label, candidate.strength, subject, answers, asked[key], questions)
    save_png(contact_sheet(sheet, captions), output_dir / "sheet.png")
    report = {
        "base_model": model.name,
        "num_images": num_images,
        "seed": seed,
        **painting,
        "templates": list(templates) if templates else None,
        "rows": [asdict(row) for row in rows],
        "means": {label: asdict(mean_scores([r for r in rows if (r.adapter == BASE) == (label == "base")]))
                  for label in ("base", "adapters")},
    }  # fmt: skip
    write_atomically(output_dir / "scores.json", json.dumps(report, indent=2) + "\n")
    return rows


def adapter_files(names: Iterable[str | Path]) -> list[Path]:
    """The files that `names` mean (see `find_adapter`), each once."""
    return list(dict.fromkeys(find_adapter(name) for name in names))


def mean_scores(rows: Sequence[Row]) -> Scores:
    """The mean of each score over the rows that have it."""
    means = Scores()
    for field in dataclasses.fields(Scores):
        values = [getattr(row.scores, field.name) for row in rows]
        known = [value for value in values if value is not None]
        setattr(means, field.name, float(np.mean(known)) if known else None)
    return means


def _questions(candidate: Candidate, model: BaseModel, templates: Sequence[str] | None, num_images: int) -> Questions:
    photos = candidate.photos.resolve()
    words = candidate.words
    adapter = read_adapter(candidate.path)
    if words is None:
        if not adapter.instance_prompt:
            raise SVFitError(f'{candidate.path} does not name its subject: add subject_words, such as "sks dog".')
        words = subject_words(adapter.instance_prompt)
    class_words = candidate.class_words or subject_words(adapter.class_prompt or words.split()[-1])
    if templates is None and (subject := bundled_subject(model.name, photos)) is not None:
        return bundled_questions(subject, words, pictures_per_prompt=num_images)
    references = [open_photo(photo.path) for photo in find_photos(photos)]
    return subject_questions(references, words, class_words, templates or PROMPTS, num_images)


def table(rows: Sequence[Row]) -> list[str]:
    """The rows as lines of text, and the means over several adapters."""
    labelled = []
    for row in rows:
        strength = "" if row.strength in (0.0, 1.0) else f":{row.strength:g}"
        labelled.append((f"{row.subject}: {row.adapter}{strength}", asdict(row.scores)))
    for label, chosen in (("base", True), ("adapters", False)):
        part = [row for row in rows if (row.adapter == BASE) == chosen]
        if len(part) > 1:
            labelled.append((f"mean of {label}", asdict(mean_scores(part))))
    return measures.as_text(measures.table(labelled))
