"""Pictures that the base painted itself, as its denoiser sees them: what it does, where nobody asks for the subject.

Painted once for a base and kept beside its directions.  A picture follows from the base, its prompt and its number
alone; the prompts are none of those by which drift and preservation are measured.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svfit_dreambooth import folders
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.reference import world_prompts
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.photos.crops import as_pixel_values
from svfit_dreambooth.training.class_pictures import is_flat, placed
from svfit_dreambooth.training.kept import keep, kept

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
SEED = 70_000  # of the first picture; away from the seeds of looks and measures
STEPS = 10  # denoising steps of each, at most
CLASS_PICTURES = 8
PLAIN_PROMPTS = (
    "a photo of an old man with a grey beard",
    "a photo of a woman laughing",
    "a photo of two children on a swing",
    "a photo of a crowd at a concert",
    "a photo of a horse in a field",
    "a photo of a bird on a branch",
    "a photo of an elephant",
    "a photo of a frog on a leaf",
    "a photo of a bowl of soup",
    "a photo of fresh strawberries",
    "a photo of a loaf of bread",
    "a photo of a birthday cake with candles",
    "a photo of a mountain lake at sunrise",
    "a photo of a waterfall",
    "a photo of a field of sunflowers",
    "a photo of a country road in autumn",
    "a photo of a lighthouse in a storm",
    "a photo of an old stone bridge",
    "a photo of a street market",
    "a photo of a living room with a fireplace",
    "a photo of a library",
    "a photo of a train station",
    "a photo of a tractor",
    "a photo of an aeroplane taking off",
    "a photo of a grand piano",
    "a photo of a wrist watch",
    "a photo of a pair of running shoes",
    "an oil painting of a harbour",
    "a black and white photo of a violinist",
    "a cartoon of a fox",
    "an illustration of a castle on a hill",
    "a poster of geometric shapes",
)


def plain_prompts(base: str) -> tuple[str, ...]:
    """What `base` is asked to paint: a bit of everything it knows."""
    return world_prompts(base) or PLAIN_PROMPTS


def kept_prompts(base: str, class_prompt: str | None) -> list[str]:
    """What a run that keeps the base lets it paint: a bit of everything, and the subject's class without its rare word."""
    return [*plain_prompts(base), *([class_prompt] * CLASS_PICTURES if class_prompt else [])]


def base_latents(
    base: BaseModel,
    prompts: Sequence[str],
    resolution: int,
    device: torch.device,
    dtype: torch.dtype,
    cache_dir: str | Path | None = None,
    *,
    steps: int | None = None,
) -> Tensor:
    """The base's own pictures of `prompts`, (prompts, channels, h, w), float32 on the CPU, in the denoiser's unit.

    Squares of `resolution` pixels; number i starts from noise of the seed `SEED + i`, and takes `steps` denoising steps at
    most, None: `STEPS`.  What is missing in `cache_dir`
    (None: `folders.cache_dir()`) is painted on `device`, the denoiser in `dtype`, in which that is left.  The base is
    known by `BaseModel.digest`, which must have been asked for before any cast.
    """
    places = picture_files(base, prompts, resolution, dtype, cache_dir, steps=steps)
    found = [_read(path) for path in places]
    missing = [number for number, latents in enumerate(found) if latents is None]
    if not missing:
        return torch.stack([latents for latents in found if latents is not None])
    flat = 0
    with placed(base, device, dtype):
        for number in tqdm(missing, desc="painting pictures of the base", unit="picture"):
            (picture,) = generate(
                base, [prompts[number]], seed=SEED + number, height=resolution, width=resolution,
                num_inference_steps=_steps(base, steps),
            )  # fmt: skip
            flat += is_flat(picture.image)
            mean, _ = base.family.encode_images(as_pixel_values(picture.image)[None])  # (1, channels, h, w)
            latents = mean[0].cpu().half()
            if not latents.isfinite().all():
                raise SVFitError(
                    f"the base's own picture of {prompts[number]!r} holds numbers that are not finite: use "
                    "mixed_precision bf16 or no."
                )
            found[number] = latents.float()
            _write(places[number], latents, base.name)
    if flat:
        logger.warning(
            "%d of %d pictures that the base painted show nothing (black or one colour).", flat, len(missing)
        )
    return torch.stack([latents for latents in found if latents is not None])


def picture_files(
    base: BaseModel,
    prompts: Sequence[str],
    resolution: int,
    dtype: torch.dtype,
    cache_dir: str | Path | None = None,
    *,
    steps: int | None = None,
) -> list[Path]:
    """Where `base_latents` keeps each of its pictures."""
    folder = Path(cache_dir or folders.cache_dir()) / "base_pictures" / base.digest
    how = [CACHE_VERSION, resolution, _steps(base, steps), *base.guiding, str(dtype)]
    how += [base.family.clip_skip] * (base.family.clip_skip > 0)
    keys = [json.dumps([*how, SEED + number, prompt]) for number, prompt in enumerate(prompts)]
    return [folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors" for key in keys]


def _steps(base: BaseModel, most: int | None) -> int:
    return min(most or STEPS, base.num_inference_steps)


def base_picture_report(
    base: BaseModel,
    class_prompt: str | None,
    resolution: int,
    dtype: torch.dtype,
    cache_dir: str | Path | None = None,
) -> str:
    """By what a run keeps the base, in a plain line."""
    prompts = kept_prompts(base.name, class_prompt)
    line = f"keep_base: by {len(prompts)} pictures of the base's own"
    if class_prompt is None:
        line += ", none of the subject's class, as class_prompt is not given"
    if next(base.family.denoiser.parameters()).is_meta:  # its weights, which would tell, are not open
        return line
    missing = sum(not path.exists() for path in picture_files(base, prompts, resolution, dtype, cache_dir))
    return f"{line}, {missing} of them still to be painted" if missing else line


def _read(path: Path) -> Tensor | None:
    """The kept latents; None where there are none, or damaged ones."""
    known = kept(path)
    return None if known is None else known[0]["latents"].float()


def _write(path: Path, latents: Tensor, base: str) -> None:
    try:
        keep(path, {"latents": latents.contiguous()}, json.dumps({"base": base}))
    except SVFitError as error:
        logger.warning("the base's picture is not kept, the next run paints it again: %s", error)
