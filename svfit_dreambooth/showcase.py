"""The picture at the end of a run: the photos, the base's answers, the adapter's answers; and the figures beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from svfit_dreambooth.base_model import BaseModel
from svfit_dreambooth.config import TOYBOX
from svfit_dreambooth.evaluation import drift, subject_fidelity
from svfit_dreambooth.generation import generate, open_for_adapters
from svfit_dreambooth.photos import open_photo
from svfit_dreambooth.pipeline import loaded_adapters, set_adapters
from svfit_dreambooth.preparation import TOYBOX_SUBJECTS
from svfit_dreambooth.training import TrainResult

PLACES = ("on the beach", "in the snow", "under water", "in the city at night")
SEED = 1000  # of the pictures shown; away from the seeds that training uses
CELL = 192  # pixels of a picture on the sheet
TRUE_IMAGES = 4  # true pictures of the subject in each setting
UNRELATED_PROMPTS = (
    "a photo of a red car in the snow",
    "a photo of a blue mug on a wooden table",
    "a photo of a green robot in the forest",
    "a photo of a yellow teapot on the beach",
    "a photo of a purple boat under water",
    "a photo of a white rocket in space",
)


@dataclass
class Figures:
    """What the judge says of some pictures."""

    subject: float  # mean cosine of identity features with true pictures of the subject
    prompt: float  # share of pictures with the right kind and setting
    drift: float | None  # change of pictures for unrelated prompts, 0 is none; None: does not apply


def show_result(result: TrainResult) -> str:
    """Paints the validation prompts from the saved file, with and without it; returns what to print.

    Writes <output_dir>/<adapter_name>.png.  For a bundled toybox subject the judge's figures are in the text.
    """
    run, config = result.run, result.run.config
    subject = _toybox_subject(config.instance_data_dir) if run.base.name == TOYBOX else None
    prompts = config.validation_prompts or _default_prompts(config.instance_prompt or "", subject)
    model = open_for_adapters(
        [(result.adapter_path, 1.0)],
        config.pretrained_model_name_or_path,
        basis_cache_dir=config.basis_cache_dir,
        revision=config.revision,
        variant=config.variant,
        base_config=config.base_config,
    )
    options: dict[str, Any] = {
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "seed": SEED,
    }
    adapted = _paint(model, prompts, 1.0, options)
    base = _paint(model, prompts, 0.0, options)
    sheet = contact_sheet(
        [
            ("photos", [open_photo(photo.path) for photo in run.photos[: max(4, len(prompts))]]),
            ("base", base),
            (run.adapter_name, adapted),
        ],
        captions=prompts,
    )
    path = Path(config.output_dir) / f"{run.adapter_name}.png"
    temporary = path.with_name(f".{path.name}.tmp")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)
    lines = [f"pictures: {path} (photos, the base's answers, the adapter's)"]
    if subject is not None:
        lines.append("judged in settings without a photo:")
        lines += _table(judge_subject(model, subject, options))
    return "\n".join(lines)


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[str]) -> Image.Image:
    """Rows of pictures with a label each; `captions` stand under the pictures of the last row."""
    columns = max(len(pictures) for _, pictures in rows)
    margin, line = CELL // 16, CELL // 8
    height = margin + len(rows) * (CELL + line + margin) + line
    sheet = Image.new("RGB", (margin + columns * (CELL + margin), height), "white")
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(CELL // 12), ImageFont.load_default(CELL // 17)
    top = margin
    for label, pictures in rows:
        draw.text((margin, top), label, fill="black", font=font)
        top += line
        for column, picture in enumerate(pictures):
            side = min(picture.size)
            left, upper = (picture.width - side) // 2, (picture.height - side) // 2
            square = picture.crop((left, upper, left + side, upper + side))
            # small pictures keep their pixels' edges, large ones are smoothed
            kernel = Image.Resampling.NEAREST if side < CELL else Image.Resampling.LANCZOS
            sheet.paste(square.resize((CELL, CELL), kernel), (margin + column * (CELL + margin), top))
        top += CELL + margin
    for column, caption in enumerate(captions):
        while caption and draw.textlength(caption, font=small) > CELL:
            caption = caption[:-2].rstrip(" .") + "…" if len(caption) > 2 else ""
        draw.text((margin + column * (CELL + margin), top - margin // 2), caption, fill="black", font=small)
    return sheet


def _paint(model: BaseModel, prompts: Sequence[str], strength: float, options: dict[str, Any]) -> list[Image.Image]:
    (name,) = loaded_adapters(model.pipeline)
    set_adapters(model.pipeline, {name: strength})
    return [picture.image for picture in generate(model, prompts, **options)]


def _toybox_subject(folder: str | None) -> str | None:
    """The bundled subject whose photos `folder` holds, if any."""
    path = Path(str(folder)).resolve()
    return path.name if path.parent == TOYBOX_SUBJECTS.resolve() else None


def _default_prompts(instance_prompt: str, subject: str | None) -> list[str]:
    places: Sequence[str] = PLACES
    if subject is not None:
        from toybox.world import PHOTO_SETTINGS, SETTING_PHRASES

        places = [SETTING_PHRASES[place] for place in SETTING_PHRASES if place not in PHOTO_SETTINGS[subject]][:4]
    return [f"{instance_prompt} {place}" for place in places]


def judge_subject(model: BaseModel, subject: str, options: dict[str, Any]) -> dict[str, Figures]:
    """What the judge says of the bundled `subject`: rows "true pictures", "base" and "adapter".

    `model` carries one adapter.  Asked for are the settings of which the subject has no photo, one picture each, and
    prompts that have nothing to do with it; compared with are true renderings in the same settings.
    """
    from toybox.judge import load_judge
    from toybox.world import PHOTO_SETTINGS, SETTING_PHRASES, SUBJECTS, render, sample_scene

    judge = load_judge()
    individual = SUBJECTS[subject]
    places = [place for place in SETTING_PHRASES if place not in PHOTO_SETTINGS[subject]]
    rng = np.random.default_rng(SEED)
    scenes = [sample_scene(rng, individual, place, "photo") for place in places for _ in range(TRUE_IMAGES)]
    true = judge.identity_features([render(scene) for scene in scenes])  # (n, d)
    prompts = [f"a photo of sks {individual.kind} {SETTING_PHRASES[place]}" for place in places]
    options = {**options, "seed": SEED + 1}
    figures = {"true pictures": Figures(_off_diagonal(true), 1.0, None)}
    unrelated: dict[str, torch.Tensor] = {}
    for name, strength in (("base", 0.0), ("adapter", 1.0)):
        images = _paint(model, prompts, strength, options)
        fits = [
            found["kind"] == individual.kind and found["setting"] == place
            for found, place in zip(judge.attributes(images), places, strict=True)
        ]
        unrelated[name] = judge.image_features(_paint(model, UNRELATED_PROMPTS, strength, options))  # (n, d)
        figures[name] = Figures(
            subject_fidelity(judge.identity_features(images), true),
            float(np.mean(fits)),
            drift(unrelated[name], unrelated["base"]),
        )
    return figures


def _table(figures: dict[str, Figures]) -> list[str]:
    lines = [f"{'':15}{'subject':>9}{'prompt':>9}{'drift':>9}"]
    for name, row in figures.items():
        drifted = "" if row.drift is None else f"{row.drift:.3f}"
        lines.append(f"{name:15}{row.subject:>9.3f}{row.prompt:>9.0%}{drifted:>9}")
    lines.append("subject: likeness to true pictures of it; prompt: right kind and setting; drift: change of others")
    return lines


def _off_diagonal(features: torch.Tensor) -> float:
    """Mean cosine between different rows of `features` (n, d)."""
    n = len(features)
    return (subject_fidelity(features, features) * n - 1) / (n - 1)
