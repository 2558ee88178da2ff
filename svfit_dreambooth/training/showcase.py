"""The picture at the end of a run: the photos, the base's answers, the adapter's answers; and the figures beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.evaluation.measures import as_text, table
from svfit_dreambooth.evaluation.metrics import diversity, drift, subject_fidelity
from svfit_dreambooth.evaluation.protocol import (
    UNRELATED_PROMPTS,
    Scores,
    bundled_questions,
    share_right,
    subject_words,
)
from svfit_dreambooth.evaluation.reference import open_judge
from svfit_dreambooth.files import save_png
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.painting.loading import load_adapter, set_adapters, unload_adapter
from svfit_dreambooth.painting.registry import loaded_adapters
from svfit_dreambooth.painting.sheets import contact_sheet
from svfit_dreambooth.training.plan import Plan
from svfit_dreambooth.training.watch import (
    SEED,
    own_subject,
    painting_options,
    run_photos,
    validation_prompts,
)


@dataclass
class Showing:
    """The sheet at the end of a run, and the judge's figures where it knows the subject."""

    sheet: Path
    figures: dict[str, Scores] | None
    first: Image.Image  # the adapter's first picture

    def summary(self) -> str:
        """What to print."""
        lines = [f"pictures: {self.sheet} (photos, the base's answers, the adapter's)"]
        if self.figures is not None:
            lines += [
                "judged in settings without a photo:",
                *as_text(table([(name, scores.known()) for name, scores in self.figures.items()])),
            ]
        return "\n".join(lines)


def show_result(plan: Plan, base: BaseModel, adapter: Path, dtype: torch.dtype) -> Showing:
    """Paints the validation prompts from the saved file, with and without it, as <output_dir>/<adapter_name>.png.

    `base`: untouched and in the precision of its files; it is cast to `dtype`, painted with, and carries no adapter
    afterwards.
    """
    load_adapter(base.pipeline, adapter, basis_cache_dir=plan.config.basis_cache_dir)
    try:
        base.family.cast(dtype)
        base.pipeline.to(default_device())
        return _show(plan, base)
    finally:
        unload_adapter(base.pipeline)


def _show(plan: Plan, model: BaseModel) -> Showing:
    prompts, options = validation_prompts(plan), painting_options(plan)
    adapted = _paint(model, prompts, 1.0, options)
    base = _paint(model, prompts, 0.0, options)
    rows = [("photos", run_photos(plan)[: max(4, len(prompts))]), ("base", base), (plan.adapter_name, adapted)]
    sheet = save_png(contact_sheet([row for row in rows if row[1]], prompts), plan.folder.sheet)
    subject = own_subject(plan)
    figures = (
        None
        if subject is None
        else judge_subject(model, subject, subject_words(str(plan.config.instance_prompt)), options)
    )
    return Showing(sheet, figures, adapted[0])


def _paint(model: BaseModel, prompts: Sequence[str], strength: float, options: dict[str, Any]) -> list[Image.Image]:
    (name,) = loaded_adapters(model.pipeline)
    set_adapters(model.pipeline, {name: strength})
    return [picture.image for picture in generate(model, prompts, **options)]


def judge_subject(model: BaseModel, subject: str, words: str, options: dict[str, Any]) -> dict[str, Scores]:
    """What the judge says of the bundled `subject`, which prompts call `words`: rows "true pictures", "base" and "adapter".

    `model` carries one adapter.  Asked for are the settings of which the subject has no photo, one picture each, and
    prompts that have nothing to do with it; compared with are true renderings in the same settings.
    """
    judge, questions = open_judge(model.name), bundled_questions(subject, words)
    true = judge.identity_features(questions.references)  # (n, d)
    options = {**options, "seed": SEED + 1}
    figures = {"true pictures": Scores(subject=1 - diversity(true[None]), right=1.0)}
    unrelated: dict[str, torch.Tensor] = {}
    for name, strength in (("base", 0.0), ("adapter", 1.0)):
        images = _paint(model, questions.prompts, strength, options)
        fits = share_right(judge.attributes(images), questions.wanted or [])
        unrelated[name] = judge.image_features(_paint(model, UNRELATED_PROMPTS, strength, options))  # (n, d)
        figures[name] = Scores(
            subject=subject_fidelity(judge.identity_features(images), true),
            right=fits,
            drift=drift(unrelated[name], unrelated["base"]),
        )
    return figures
