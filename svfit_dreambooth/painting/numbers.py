"""The numbers that a picture is asked for with."""

import inspect
from typing import Any

from diffusers import DiffusionPipeline

from svfit_dreambooth.adapter.source import check_finite
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError

LARGEST = 8  # times the base's own side: what one may ask to paint
MOST_IMAGES = 1_000_000  # of a prompt


def check_numbers(
    model: BaseModel, num_images: int, seed: int, steps: int, guidance_scale: float, height: int, width: int
) -> None:
    """Raises SVFitError for numbers that the base cannot paint with."""
    multiple, largest = size_multiple(model), LARGEST * model.resolution
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % multiple or size > largest:
            raise SVFitError(
                f"{name} {size} does not work: it must be a multiple of {multiple}, at most {largest}.", name
            )
    if not 1 <= num_images <= MOST_IMAGES:
        raise SVFitError(f"num_images is {num_images}: give 1 to {MOST_IMAGES:,}.")
    most = model.pipeline.scheduler.config.num_train_timesteps
    if not 1 <= steps <= most:
        raise SVFitError(f"num_inference_steps is {steps}: give 1 to {most}, the steps of this base's noise schedule.")
    if not -(2**63) <= seed <= 2**64 - num_images:  # what torch takes
        raise SVFitError(f"seed is {seed}: for {num_images} pictures, give at most {2**64 - num_images}.", "seed")
    check_finite("guidance_scale", guidance_scale)


def size_multiple(model: BaseModel) -> int:
    """What sides of its pictures are multiples of, in pixels."""
    return max(model.family.required_multiple, 8)


def rescale_for(model: BaseModel, painter: DiffusionPipeline, asked: float | None) -> float:
    """The guidance rescale with which `painter`, a pipeline of `model`, paints; 0 is none.

    The share phi by which a guided answer is brought back to the spread of the answer to the prompt, which guidance
    exaggerates (Lin et al., "Common diffusion noise schedules", 2023, equations 15 and 16).  `asked`: None takes what
    suits the base, if `painter` knows of it.
    Raises SVFitError for numbers outside 0 to 1, and where `painter` knows nothing of it.
    """
    known = "guidance_rescale" in inspect.signature(painter.__call__).parameters
    if asked is None:
        return model.family.guidance_rescale if known else 0.0
    if not 0 <= asked <= 1:
        raise SVFitError(f"guidance_rescale is {asked}: give 0 to 1.", "guidance_rescale")
    if asked and not known:
        raise SVFitError(
            f"guidance_rescale {asked:g} does not work here: diffusers has it for Stable Diffusion 1.x and 2.x that "
            "paint from noise, and for XL. Leave it out.",
            "guidance_rescale",
        )
    return float(asked)


def rescaling(rescale: float) -> dict[str, Any]:
    """What a pipeline is called with for it; those that know nothing of it are not told."""
    return {"guidance_rescale": rescale} if rescale else {}
