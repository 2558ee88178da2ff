"""Bases that were distilled to paint in a few steps: how they are known, and how they are painted with.

Stable Diffusion's are known by a denoiser that is told the guidance (latent consistency models, arXiv:2310.04378) and by
their sampler, else by their name alone; other families tell by themselves, see `Family.undistilled`.
"""

import re
from dataclasses import dataclass

from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.flow import FlowTransformer
from svfit_dreambooth.bases.stable_diffusion import StableDiffusion

SAMPLERS = ("LCMScheduler", "TCDScheduler")
WORD = re.compile(r"(?<![a-z])(turbo|lightning|lcm|hyper)(?![a-z])", re.IGNORECASE)
COUNT = re.compile(r"(?<!\d)(\d{1,2})[ _-]?steps?(?![a-z])", re.IGNORECASE)  # as in "sdxl_lightning_4step"
STEPS = 4
UNGUIDED = 1.0
TOLD = 8.0  # the guidance that a denoiser is told unasked, as in the pipeline of latent consistency models


@dataclass(frozen=True)
class FewSteps:
    """What suits such a base."""

    num_inference_steps: int
    guidance_scale: float
    sign: str  # by what it is known, in words


def few_steps(name: str, family: Family) -> FewSteps | None:
    """What suits the base that is called `name`; None where nothing says that it was distilled."""
    if isinstance(family, FlowTransformer):
        sign = "its name says turbo" if family.is_turbo else "its configs say so"
        return FewSteps(family.few_steps, family.guidance_scale, sign) if family.undistilled is not None else None
    if not isinstance(family, StableDiffusion):
        return None
    word, count = WORD.search(name), COUNT.search(name)
    steps = int(count[1]) if word and count and int(count[1]) else STEPS
    if family.denoiser.config.time_cond_proj_dim is not None:
        return FewSteps(steps, TOLD, "its denoiser is told the guidance")
    sampler = type(family.pipeline.scheduler).__name__
    if sampler in SAMPLERS:
        return FewSteps(steps, UNGUIDED, f"its sampler is {sampler}")
    return FewSteps(steps, UNGUIDED, f"its name says {word[1].lower()}") if word else None
