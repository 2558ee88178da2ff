"""Painting that starts from a picture instead of noise, with the adapters: diffusers' pipelines on the same components."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image, ImageOps

from svfit_dreambooth.errors import SVFitError


@dataclass(frozen=True)
class Begin:
    """A picture to begin with, of which `strength` (0 to 1) is painted anew; with a mask only where that is white."""

    image: Image.Image
    strength: float = 0.6
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and 0 < self.strength <= 1):
            raise SVFitError(f"the strength is {self.strength}: give more than 0, up to 1.", "strength")

    def check_steps(self, steps: int) -> None:
        """Raises SVFitError where so little is painted anew that no step is left."""
        if int(steps * self.strength) < 1:
            raise SVFitError(
                f"num_inference_steps {steps} at a strength of {self.strength:g} leaves no step: give "
                f"{math.ceil(1 / self.strength)} or more.",
                "num_inference_steps",
                "strength",
            )

    def size(self, multiple: int, side: int) -> tuple[int, int]:
        """Width and height like the picture's, with about side * side pixels, in multiples of `multiple`."""
        scale = side / math.sqrt(self.image.width * self.image.height)
        width, height = (max(multiple, round(edge * scale / multiple) * multiple) for edge in self.image.size)
        return width, height


def pipeline_from(pipeline: DiffusionPipeline, begin: Begin) -> DiffusionPipeline:
    """The pipeline of diffusers that begins with a picture, on the components of `pipeline`: nothing is loaded again.

    Raises SVFitError for bases for which diffusers has none.
    """
    kind = AutoPipelineForImage2Image if begin.mask is None else AutoPipelineForInpainting
    try:
        found = kind.from_pipe(pipeline)
    except (ValueError, OSError):
        found = None
    # those without a strength look at the picture while they paint from noise, which is another thing
    if found is None or "strength" not in inspect.signature(found.__call__).parameters:
        what = "a picture" if begin.mask is None else "a mask"
        raise SVFitError(
            f"diffusers has no pipeline that begins with {what} for a {type(pipeline).__name__}: paint from noise."
        )
    return found


def begin_arguments(call: Callable[..., Any], begin: Begin, width: int, height: int) -> dict[str, Any]:
    """What the pipeline is called with for `begin`: picture and mask are cut to the size and scaled."""
    arguments: dict[str, Any] = {
        "image": ImageOps.fit(begin.image.convert("RGB"), (width, height), Image.Resampling.LANCZOS),
        "strength": begin.strength,
        "width": width,
        "height": height,
    }
    if begin.mask is not None:
        arguments["mask_image"] = ImageOps.fit(begin.mask.convert("L"), (width, height), Image.Resampling.NEAREST)
    accepted = inspect.signature(call).parameters
    return {name: value for name, value in arguments.items() if name in accepted}
