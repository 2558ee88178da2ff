"""Pictures that are painted in one call, each with a prompt, a seed and a mix of adapters of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.painting.generate import paint
from svfit_dreambooth.painting.loading import set_adapters
from svfit_dreambooth.painting.mixes import adapter_mixes
from svfit_dreambooth.painting.prompts import prompt_arguments
from svfit_dreambooth.painting.registry import clip_skips, reading


@dataclass(frozen=True)
class Sample:
    """A picture to be painted."""

    words: Mapping[str, Any]  # what it says to the pipeline, see `read_words`
    seed: int
    mix: Mapping[str, float]  # name of an adapter on the pipeline -> strength
    clip_skip: int = 0  # with which its prompt is read

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for those that fit into one call: all as texts, with negative ones or without, or all as embeddings of one
        length; and all read alike by CLIP.

        No negative prompt is not the same as an empty one: SDXL reads zeros for it.
        """
        words = ((name, type(value), getattr(value, "shape", None)) for name, value in self.words.items())
        return (self.clip_skip, *words)


def read_words(
    model: BaseModel,
    prompt: str,
    negative_prompt: str | None,
    mix: Mapping[str, float],
    guidance_scale: float,
    prompt_weights: bool = False,
    clip_skip: int | None = None,
) -> tuple[dict[str, Any], int]:
    """What the pipeline is told of a prompt, and with which `clip_skip` that is read: None as the first adapter was trained.

    Embeddings are made with the adapters of `mix`, which rest afterwards.
    """
    set_adapters(model.pipeline, dict(mix))
    trained = clip_skips(model.pipeline)
    skipped = next((trained[name] for name in mix), 0) if clip_skip is None else clip_skip
    try:
        with reading(model.pipeline, skipped):
            words = prompt_arguments(model.pipeline, prompt, negative_prompt, prompt_weights)
            return model.family.painting_arguments(words, guidance_scale), skipped
    finally:
        set_adapters(model.pipeline, {})


def paint_batch(
    model: BaseModel,
    batch: Sequence[Sample],
    on_denoising_step: Callable[[int, int], bool | None] | None = None,
    **common: Any,
) -> list[tuple[Image.Image, bool]] | None:
    """Paints samples of one kind in one call; results as of `paint`.  `common`: the pipeline's arguments for all.

    Afterwards prompts are read as these were, until the pictures' settings are noted and other adapters are set.
    """
    words: dict[str, Any] = {}
    for name, first in batch[0].words.items():
        values = [sample.words[name] for sample in batch]
        if isinstance(first, torch.Tensor):
            words[name] = torch.cat(values)
        elif isinstance(first, list):  # of embeddings, each of its own length
            words[name] = [embedding for value in values for embedding in value]
        else:
            words[name] = values if isinstance(first, str) else first  # None, and the guidance, are the same for all
    with adapter_mixes(model.pipeline, [sample.mix for sample in batch]):
        model.family.read_earlier(batch[0].clip_skip)
        generators = [torch.Generator().manual_seed(sample.seed) for sample in batch]
        return paint(model, on_denoising_step, **{**common, **words}, generator=generators)
