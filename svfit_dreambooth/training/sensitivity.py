"""How much a base's predictions depend on each of its singular values: measured once per base, before any subject.

All adapters of a base move along the same directions, so it can be known beforehand which of them carry everything
that it paints.  With p the denoiser's answer, N numbers, to noisy latents x_t at the timestep t under the prompt c,

    F_i = E |dp / ds_i|^2 / N        over x_t, t and c

is the mean squared change of an answer for a shift of 1 in value i.  One backward pass of v . p with random signs v
gives d(v . p)/ds_i for all i at once, and its square is on average |dp / ds_i|^2 (Hutchinson's estimator of the diagonal
of J^T J, whose off-diagonal parts the signs average away).  The latents are of pictures that the base painted itself
(base_pictures.py); no photo, no subject and no prompt by which runs are judged enters.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svfit_dreambooth import folders
from svfit_dreambooth.bases.family import Conditions
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.decomposition import Rank
from svfit_dreambooth.training.base_pictures import base_latents, plain_prompts
from svfit_dreambooth.training.kept import keep, kept
from svfit_dreambooth.training.probing import gradient, probed

logger = logging.getLogger(__name__)

VERSION = "2"
PASSES = 40  # backward passes of one example each; the error of F_i falls with their square root
PICTURES = 6  # of the base's own
STEPS = 5  # denoising steps of each, at most: noise is added to them anyway
EMPTY_EVERY = 4  # one pass in so many has the empty prompt, which guidance asks too
COST = (
    "measuring how much each value matters, once for this base and these layers: {pictures} pictures of "
    "{steps} steps and {passes} passes, about the time of 30 steps of batch 4"
)


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a base; values go by "<component>.<layer>"."""

    values: dict[str, Tensor]  # F_i of a layer's singular values, the largest value first, (r,) float32
    power: float  # mean square of a number of the answers, to which F_i is compared
    error: float  # relative standard error of F_i: the median over all values


def asked_prompts(base: str) -> tuple[str, ...]:
    """What the base of that name is let paint."""
    prompts = plain_prompts(base)
    return prompts[:: max(1, len(prompts) // PICTURES)][:PICTURES]


def base_sensitivity(
    base: BaseModel,
    targets: Mapping[str, Sequence[str]],
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str] | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
    resolution: int | None = None,
    rank: Rank = "full",
    energy: float | None = None,
    cache_dir: str | Path | None = None,
    on_measuring: Callable[[str], None] = logger.info,
) -> Sensitivity:
    """The sensitivity of `base` to its singular values, as it was measured before, else measured now and kept.

    `targets`: component -> layers; `weights`, `hashes`: of these layers, as they are stored, by "<component>.<layer>".
    `resolution`: side of the pictures in pixels, None or larger: the base's own.  `rank`, `energy`: which values, see
    `layer.resolve_rank`.  `checkpointing`: gradient checkpointing.  `cache_dir`: as for `model_basis`.
    `on_measuring` is told what it is going to cost, before it starts.  The text encoders are asked about `asked_prompts`
    and the empty prompt; where they were let go, the family must have those answers.

    It follows from the base, the arguments and fixed seeds alone; the base is known by its digest, which must have been
    asked for before any cast, and the fingerprint of those weights.  Measuring moves the pipeline to `device` and its adapted networks into `dtype`, as training does.
    Raises SVFitError where gradients are not finite.
    """
    resolution = min(resolution or base.resolution, base.resolution)
    prompts = asked_prompts(base.name)
    prints = {component: own["sha256"] for component, own in fingerprint(weights, hashes).items()}
    steps = min(STEPS, base.num_inference_steps)
    how = [VERSION, prompts, steps, PASSES, *base.guiding, resolution, str(dtype), rank, energy]
    facts = json.dumps([base.digest, prints, *how])
    folder = Path(cache_dir or folders.cache_dir()) / "sensitivity"
    path = folder / f"{hashlib.sha256(facts.encode()).hexdigest()}.safetensors"
    if (known := kept(path)) is not None:
        values, measures = known
        measured = json.loads(measures)
        return Sensitivity(values, measured["power"], measured["error"])
    on_measuring(COST.format(pictures=len(prompts), steps=steps, passes=PASSES))
    latents = base_latents(base, prompts, resolution, device, dtype, cache_dir, steps=steps)  # (pictures, c, h, w)
    found = _measured(
        base, prompts, latents, targets, weights, hashes, device, dtype, checkpointing,
        rank=rank, energy=energy, cache_dir=cache_dir,
    )  # fmt: skip
    try:
        keep(path, found.values, json.dumps({"base": base.name, "power": found.power, "error": found.error}))
    except SVFitError as error:
        logger.warning("the sensitivity is not kept, the next start measures it again: %s", error)
    return found


def _measured(
    base: BaseModel,
    prompts: Sequence[str],
    latents: Tensor,
    targets: Mapping[str, Sequence[str]],
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str] | None,
    device: torch.device,
    dtype: torch.dtype,
    checkpointing: bool,
    **which: Any,
) -> Sensitivity:
    """`which`: rank, energy and cache_dir, see `probed`."""
    family = base.family
    through_text = any(family.role(component) == "text_encoder" for component in targets)
    texts = [*prompts, ""]
    table = family.tokenize(texts) if through_text else family.conditions(texts)  # (prompts, ...) each
    with (
        base.opened(*targets, device=device, dtype=dtype),
        probed(family, targets, weights, hashes, device, dtype, checkpointing=checkpointing, **which) as shifts,
    ):
        sums = {name: torch.zeros(2, len(shift), dtype=torch.float64) for name, shift in shifts.items()}
        power = 0.0
        for number in tqdm(range(PASSES), desc="measuring the sensitivity", unit="pass", leave=False):
            row = len(prompts) if number % EMPTY_EVERY == EMPTY_EVERY - 1 else number % len(prompts)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                told = {name: rows[row : row + 1].to(device) for name, rows in table.items()}
                if through_text:
                    told = family.encode_tokens(told, family.text_encoders)
                answer = _answer(base, latents, number, told, device, dtype).float()  # (1, channels, h, w)
            signs = torch.randint(0, 2, answer.shape, generator=_generator(number, "signs")) * 2.0 - 1
            (answer * signs.to(answer)).sum().backward()
            power += answer.detach().square().mean().item() / PASSES
            for name, shift in shifts.items():
                squares = gradient(shift).detach().double().cpu().square() / answer.numel()  # (r,)
                sums[name] += torch.stack([squares, squares.square()]) / PASSES
                shift.grad = None
    for name, (mean, _) in sums.items():
        if not torch.isfinite(mean).all():
            raise SVFitError(f"the gradients of {name} are not finite: use mixed_precision bf16 or no.")
    every = torch.cat(list(sums.values()), dim=1)  # (2, values)
    mean, of_squares = every[:, every[0] > 0]
    if len(mean) == 0:
        raise SVFitError(f"no singular value of {base.name} changes its predictions: check the base model.")
    error = (((of_squares - mean.square()).clamp(min=0) / (PASSES - 1)).sqrt() / mean).median()
    return Sensitivity({name: own[0].float() for name, own in sums.items()}, power, float(error))


def _answer(
    base: BaseModel, latents: Tensor, number: int, told: Conditions, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The denoiser's answer in pass `number`, (1, channels, h, w), to noise on one of the pictures."""
    family, noising, generator = base.family, base.family.noising(), _generator(number, "example")
    own = latents[number % len(latents)][None]  # (1, channels, h, w)
    noise = torch.randn(own.shape, generator=generator).to(device)
    timesteps = torch.tensor([noising.draw_timestep(generator, own.shape[1:])], device=device)
    noisy_latents = noising.noisy_latents(own.to(device), noise, timesteps)
    height, width = (side * family.pixels_per_latent for side in own.shape[-2:])
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=device)
    return family.predict(family.denoiser, noisy_latents.to(dtype), timesteps, told, time_ids)


def _generator(number: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(2 * number + (purpose == "signs"))
