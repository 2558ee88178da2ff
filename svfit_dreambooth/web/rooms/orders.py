"""What can be ordered to be painted: a prompt with adapters, once or in cells that differ in a setting or two."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svfit_dreambooth.errors import SVFitError

MAX_PIXELS = 2048  # of a side
MAX_PICTURES = 64  # of one order
MAX_STEPS = 200
MAX_PROMPT = 4000  # characters
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
AS_TRAINED = "the adapters' own"  # the base that the first adapter names, or the embedded one


@dataclass(frozen=True)
class Cell:
    """What is different in some of the pictures of an order; None: as the order says."""

    factor: float = 1.0  # of every strength; 0: the base alone
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    only: int | None = None  # number of the adapter that alone is on


@dataclass
class Order:
    """What is to be painted, `num_images` pictures for each of `cells`."""

    prompt: str
    base: str  # as `Bases` names it
    adapters: Sequence[tuple[Path, float]] = ()  # (file, strength)
    negative_prompt: str = ""
    num_images: int = 1
    seed: int = 0
    num_inference_steps: int | None = None  # None: what suits the base
    guidance_scale: float | None = None  # None: the base's own
    guidance_rescale: float | None = None  # None: what suits the base
    width: int | None = None  # None: the base's own
    height: int | None = None
    scheduler: str | None = None  # a name of samplers.SAMPLERS; None: the base's own
    clip_skip: int | None = None  # None: as the adapters were trained
    autoencoder: str = ""  # as a person named it; "": the base's own
    quantize: str | None = None  # see `open_base_model`
    trained_on: str = ""  # as a person named it: the base that the adapters were trained on, see `load_adapter`
    begin: Any = None  # from_picture.Begin, to paint from instead of noise
    cells: Sequence[Cell] = (Cell(),)
    allow_other_base: bool = False

    def strengths(self, cell: Cell) -> list[float]:
        """Of the adapters, in their order."""
        return [
            strength * cell.factor if cell.only in (None, i) else 0.0 for i, (_, strength) in enumerate(self.adapters)
        ]

    @property
    def opened(self) -> tuple[Any, ...]:
        """How the base is opened, beside its name."""
        return self.autoencoder, self.quantize, self.trained_on

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What pictures that are painted in one batch must have in common, as options of `generate`."""
        return {
            "num_inference_steps": cell.num_inference_steps or self.num_inference_steps,
            "guidance_scale": self.guidance_scale if cell.guidance_scale is None else cell.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "height": self.height,
            "width": self.width,
            "scheduler": self.scheduler,
            "clip_skip": self.clip_skip,
            "begin": self.begin,
        }


@dataclass
class Told:
    """What painting tells while it works: "waiting", "opening", "loading", "step" or "picture"."""

    kind: str
    picture: Any = None  # painting.picture.Picture
    number: int = 0  # of the picture, from 0
    pictures: int = 0
    step: int = 0
    of: int = 0
    cell: Cell = Cell()


def check(order: Order) -> None:
    """Raises SVFitError for an order that would never end or fit."""
    if not order.prompt.strip():
        raise SVFitError("the prompt is empty: say what to paint, such as “a photo of sks dog on the beach”.")
    for what, text in (("prompt", order.prompt), ("negative prompt", order.negative_prompt)):
        if len(text) > MAX_PROMPT:
            raise SVFitError(f"the {what} has {len(text):,} characters: {MAX_PROMPT:,} are the most.")
    for name, value, most in (
        ("number of pictures", order.num_images, MAX_PICTURES),
        ("number of pictures in all", order.num_images * len(order.cells), MAX_PICTURES),
        *(
            ("number of steps", cell.num_inference_steps or order.num_inference_steps or 1, MAX_STEPS)
            for cell in order.cells
        ),
        ("width", order.width or 1, MAX_PIXELS),
        ("height", order.height or 1, MAX_PIXELS),
    ):
        if not 1 <= value <= most:
            raise SVFitError(f"the {name} is {value}: it must be between 1 and {most}.")
    if len({path for path, _ in order.adapters}) < len(order.adapters):
        raise SVFitError("an adapter is chosen twice: raise its strength instead.")
