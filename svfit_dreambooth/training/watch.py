"""Looking at a run while it trains: pictures with fixed seeds, likeness to the photos, harm to everything else."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from svfit_dreambooth.adapter.file import Adapter, save_adapter
from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.names import bundled_subject
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.features import Features
from svfit_dreambooth.evaluation.metrics import drift, prompt_fidelity, subject_fidelity
from svfit_dreambooth.evaluation.protocol import UNRELATED_PROMPTS
from svfit_dreambooth.evaluation.reference import unseen_settings
from svfit_dreambooth.files import save_png
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.method.word import word_embedding
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.painting.sheets import contact_sheet
from svfit_dreambooth.photos.reading import open_photo
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.events import Measured
from svfit_dreambooth.training.plan import Plan

logger = logging.getLogger(__name__)

SEED = 1000  # of the pictures shown; away from the seeds that training uses
AUTO_LOOKS = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # parts of the run
CLEARLY = 0.1  # of the score: what one look is worse than another by; with other seeds the difference is .06 off
PLACES = ("on the beach", "in the snow", "under water", "in the city at night")


def score(measured: Measured) -> float | None:
    """Likeness plus fit to the prompts less harm elsewhere, by which the best step is kept.

    All three are cosines of features, weighed alike.  Without a network that sees likeness and harm: the loss on fixed
    noise, negated.
    """
    if measured.subject is not None and measured.drift is not None:
        return measured.subject + (measured.prompt or 0.0) - measured.drift
    return None if measured.fixed_loss is None else -measured.fixed_loss


def doubt(measured: Measured) -> float:
    """How far two scores may lie apart and say nothing: none where both are losses on the same noise."""
    return 0.0 if measured.subject is None or measured.drift is None else CLEARLY


def look_steps(config: TrainConfig) -> set[int]:
    """The steps after which a run is looked at, the last one always: closer together at the beginning, where most moves."""
    of, every = config.max_train_steps, config.validation_steps
    if every == "auto":
        return {max(1, round(share * of)) for share in AUTO_LOOKS}
    return {*range(every, of + 1, every), of} if every else set()


class Watch:
    """Paints and measures a run at its milestones; holds what every look is compared with."""

    def __init__(self, plan: Plan, features: Features, adapter_of: Callable[[int], Adapter] | None = None) -> None:
        """`adapter_of`: what was learnt until a step, which every look keeps beside its pictures."""
        self.plan, self.features, self.adapter_of = plan, features, adapter_of
        self.prompts = validation_prompts(plan)
        self.folder = plan.folder
        self.photos: Tensor | None = None  # (photos, d)
        self.untouched: Tensor | None = None  # (unrelated prompts, d), features of the base's own pictures

    def look(self, step: int, fixed_loss: float | None) -> Measured:
        """Paints the prompts with the values of `step`, adds a row to the sheet, and measures.

        The adapter is kept as it is now, so that any look's step can be used later; a few hundred kilobytes a look.
        A disk that takes neither is a warning: the measures decide which step is kept.
        """
        model, options = self.plan.base, painting_options(self.plan)
        pictures = [picture.image for picture in generate(model, self.prompts, **options)]
        try:
            save_png(join(pictures), self.folder.look(step))
            self.draw_grid()
            if step and self.adapter_of is not None:
                dtype = getattr(torch, self.plan.config.save_dtype)
                save_adapter(self.adapter_of(step), self.folder.look_adapter(step), dtype)
        except (SVFitError, OSError) as error:
            logger.warning("the look at step %d is not kept whole: %s Training goes on.", step, error)
        found = {"fixed_loss": fixed_loss, "subject": self._likeness(pictures), "prompt": None, "drift": None}
        if self.features.picture is not None and self.features.text is not None:
            texts = self.features.text([self.without_rare_words(prompt) for prompt in self.prompts])
            found["prompt"] = prompt_fidelity(self.features.picture(pictures), texts)
        if self.features.any is not None:
            found["drift"] = self._drift(self.features.any)
        return Measured(step, **{name: None if value is None else round(value, 5) for name, value in found.items()})

    def _likeness(self, pictures: Sequence[Image.Image]) -> float | None:
        """Of `pictures` to the photos; None without a network for it, and where the photos are gone."""
        if self.features.subject is None:
            return None
        if self.photos is None:
            photos = run_photos(self.plan)
            if not photos:
                logger.warning("the photos are gone: likeness to them is not measured.")
                return None
            self.photos = self.features.subject(photos)
        return subject_fidelity(self.features.subject(pictures), self.photos)

    def _drift(self, see: Callable[[Sequence[Image.Image]], Tensor]) -> float:
        """Change of pictures that have nothing to do with the subject, against the base's own."""
        model, options = self.plan.base, painting_options(self.plan)

        def others() -> Tensor:
            return see([picture.image for picture in generate(model, UNRELATED_PROMPTS, **options)])

        now = others()
        if self.untouched is None:
            with nothing_learnt(model.family) as was_learnt:  # a run that goes on from an adapter begins away from it
                self.untouched = others() if was_learnt else now
        return drift(now, self.untouched)

    def without_rare_words(self, prompt: str) -> str:
        """The prompt as a judge of pictures can read it: the class prompt in place of the instance prompt, if given."""
        config = self.plan.config
        if config.instance_prompt and config.class_prompt:
            return prompt.replace(config.instance_prompt, config.class_prompt)
        return prompt

    def draw_grid(self) -> None:
        """<output_dir>/validation.png: one row for every look so far."""
        rows = []
        for path in sorted(self.folder.looks.glob("step_*.png")):
            with Image.open(path) as strip:
                rows.append((f"step {int(path.stem.partition('_')[2])}", cut(strip.convert("RGB"), len(self.prompts))))
        save_png(contact_sheet(rows, self.prompts), self.folder.looks_sheet)


@contextmanager
def nothing_learnt(family: Family) -> Iterator[bool]:
    """Within it all shifts and word deltas of the base are zero; gives whether they were not before."""
    models = family.components.values()
    values = [layer.shift for model in models for layer in svfit_layers(model).values()]
    embeddings = [embedding for embedding in map(word_embedding, models) if embedding is not None]
    values += [delta for embedding in embeddings for delta in embedding.deltas().values()]
    held = [value.detach().clone() for value in values]
    with torch.no_grad():
        for value in values:
            value.zero_()
    try:
        yield any(bool(value.any()) for value in held)
    finally:
        with torch.no_grad():
            for value, before in zip(values, held, strict=True):
                value.copy_(before)


def painting_options(plan: Plan) -> dict[str, Any]:
    """How the pictures of this run are painted."""
    config = plan.config
    return {
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "seed": SEED,
    }


def validation_prompts(plan: Plan) -> list[str]:
    """The prompts that the run was given, else the instance prompt in a few places where it has no photo."""
    if plan.config.validation_prompts:
        return plan.config.validation_prompts
    subject = own_subject(plan)
    places = PLACES if subject is None else list(unseen_settings(subject).values())[:4]
    return [f"{plan.config.instance_prompt or plan.photos[0].captions[0]} {place}" for place in places]


def own_subject(plan: Plan) -> str | None:
    """The bundled subject that the run trains, if it does."""
    return bundled_subject(plan.base.name, str(plan.config.instance_data_dir))


def run_photos(plan: Plan) -> list[Image.Image]:
    """The run's photos; those that were deleted since it began are left out."""
    pictures = []
    for photo in plan.photos:
        try:
            pictures.append(open_photo(photo.path))
        except (OSError, SVFitError):
            continue
    return pictures


def join(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side."""
    width, height = pictures[0].size
    strip = Image.new("RGB", (width * len(pictures), height))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (number * width, 0))
    return strip


def cut(strip: Image.Image, count: int) -> list[Image.Image]:
    """The `count` pictures that `join` put side by side."""
    width = strip.width // count
    return [strip.crop((number * width, 0, (number + 1) * width, strip.height)) for number in range(count)]
