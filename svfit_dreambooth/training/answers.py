"""What the frozen networks of a base say of a run's prompts and photos: asked once, kept beside the run.

Of a base that is opened one network at a time, each is let go as soon as all has been asked, and a run that goes on
finds the answers in its folder: <output_dir>/encoded/, a file each, named by the hash of all that the answer follows from.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.protocol import UNRELATED_PROMPTS
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.photos.captions import shuffled
from svfit_dreambooth.photos.reading import Photo
from svfit_dreambooth.training.base_pictures import kept_prompts
from svfit_dreambooth.training.class_pictures import usable_class_pictures
from svfit_dreambooth.training.kept import keep, kept
from svfit_dreambooth.training.optimizer import needs_sensitivity
from svfit_dreambooth.training.plan import Plan
from svfit_dreambooth.training.sensitivity import asked_prompts
from svfit_dreambooth.training.watch import validation_prompts

logger = logging.getLogger(__name__)

Answer: TypeAlias = dict[str, Tensor]
Ask: TypeAlias = Callable[[Any, Callable[[], Answer]], Answer]


@contextmanager
def asking(plan: Plan, parts: Sequence[str], device: torch.device, dtype: torch.dtype = torch.float32) -> Iterator[Ask]:
    """Within it a function answers questions by those networks of the base, on `device`.

    It is given all that the answer follows from beside the networks, as JSON takes it, and who asks them.  A base that
    is opened one network at a time: they are opened, in `dtype`, at the first question whose answer is not kept yet, and let go
    at the end.
    """
    base, folder = plan.base, plan.folder.encoded
    print = None if base.stored is None else base.stored.print(*parts)
    with ExitStack() as stack:
        if print is None:
            stack.enter_context(base.opened(*parts, device=device))

        def answer(question: Any, ask: Callable[[], Answer]) -> Answer:
            if print is None:
                return ask()
            key = hashlib.sha256(json.dumps([print, str(dtype), question]).encode()).hexdigest()
            known = _read(folder / f"{key}.safetensors")
            if known is None:
                if not all(map(base.is_open, parts)):
                    stack.enter_context(base.opened(*parts, device=device, dtype=dtype))
                known = {name: rows.cpu().contiguous() for name, rows in ask().items()}
                _keep(folder / f"{key}.safetensors", known)
            return known

        yield answer


def ask_prompts(plan: Plan, prompts: Sequence[str], device: torch.device) -> None:
    """Lets the text encoders of a base that is opened one network at a time read `prompts`, and lets them go.

    Its family has the answers from then on.  Raises SVFitError for answers that are no numbers.
    """
    base, family = plan.base, plan.base.family
    if base.stored is None:
        return
    encoders = [part for part in base.stored.parts if part in family.text_encoder_names]
    if not svfit_layers(family.denoiser):
        base.let_go(family.denoiser_name)  # of an earlier run on the same base
    dtype = torch.float32 if plan.config.mixed_precision == "no" else torch.bfloat16  # T5 overflows in float16
    with asking(plan, encoders, device, dtype) as answer:
        for prompt in prompts:
            told = answer(["prompt", prompt], lambda prompt=prompt: family.conditions([prompt]))  # type: ignore[misc]
            if not all(bool(torch.isfinite(rows).all()) for rows in told.values()):
                raise SVFitError(
                    f"the text encoders of {base.name} answer the prompt {prompt!r} with NaN or infinity: their files are "
                    "damaged, fetch the base again, or use mixed_precision no."
                )
            family.answers[prompt] = told
    base.let_go(*encoders)


def run_prompts(plan: Plan) -> list[str]:
    """Every text that the run will ask its base about: captions, class, looks and the empty one."""
    config = plan.config
    captions = photo_captions(plan, plan.photos, str(config.instance_prompt))
    texts = [text for own in captions for text in own] + ["", plan.base.family.no_prompt]
    if config.with_prior_preservation:
        present = usable_class_pictures(Path(str(config.class_data_dir)))
        texts += [str(config.class_prompt), *(text for photo in present for text in photo.captions)]
    if config.keep_base:
        texts += kept_prompts(plan.base.name, config.class_prompt)
    if config.validation_steps or config.final_pictures:
        texts += validation_prompts(plan)
    if config.validation_steps:
        texts += UNRELATED_PROMPTS
    if needs_sensitivity(config):
        texts += asked_prompts(plan.base.name)
    return list(dict.fromkeys(texts))


def photo_captions(plan: Plan, photos: Sequence[Photo], prompt: str, of_class: bool = False) -> list[tuple[str, ...]]:
    """The texts of each photo, of which training draws one; `prompt` where a photo has none."""
    config = plan.config
    captions = [photo.captions or (prompt,) for photo in photos]
    if not config.shuffle_caption or of_class:
        return captions
    return [
        tuple(order for text in texts for order in shuffled(text, config.keep_tokens, config.seed))
        for texts in captions
    ]


def _read(path: Path) -> Answer | None:
    """The answer that is kept there; None for none, and with a warning for a damaged one."""
    known = kept(path)
    if known is None and path.is_file():
        logger.warning("%s is damaged, its answer is asked for again.", path)
    return None if known is None else known[0]


def _keep(path: Path, answer: Answer) -> None:
    """A full disk is a warning: the run goes on, and one that resumes it asks again."""
    try:
        keep(path, answer)
    except (SVFitError, OSError) as error:
        logger.warning("an answer of the base is not kept: %s", error)
