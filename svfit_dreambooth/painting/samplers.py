"""Samplers: the ways through the noise schedule that other programs offer, by the names that they have there."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from svfit_dreambooth.errors import SVFitError

# name -> (scheduler of diffusers, what it is made with)
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}),
    "dpm++_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # as Stable Diffusion has it
}


def samplers_of(pipeline: DiffusionPipeline) -> list[str]:
    """The names that go with the noise schedule of `pipeline`; none for flow-matching bases, which keep their own."""
    if pipeline.scheduler.config.get("use_flow_sigmas"):
        return []
    kinds = {kind.__name__ for kind in getattr(pipeline.scheduler, "compatibles", [])}
    return [name for name, (kind, _) in SAMPLERS.items() if kind in kinds]


@contextmanager
def sampled_with(pipeline: DiffusionPipeline, name: str | None) -> Iterator[None]:
    """Within it `pipeline` samples by that name; None: as the base comes.  Raises SVFitError for one that does not fit."""
    if name is None:
        yield
        return
    fitting = samplers_of(pipeline)
    if name not in fitting:
        others = f"use one of {', '.join(fitting)}" if fitting else "this base has its own alone, leave it out"
        raise SVFitError(f"scheduler is {name!r}: {others}.", "scheduler")
    own, (kind, options) = pipeline.scheduler, SAMPLERS[name]
    pipeline.scheduler = getattr(diffusers, kind).from_config(own.config, **options)
    try:
        yield
    finally:
        pipeline.scheduler = own
