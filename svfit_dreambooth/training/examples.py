"""Photos, captions and class pictures as the denoiser sees them: encoded once, before the first step."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from svfit_dreambooth.bases.devices import MIXED_PRECISION
from svfit_dreambooth.bases.family import Conditions, Family, Tokens
from svfit_dreambooth.photos.crops import Crops, crop_photo
from svfit_dreambooth.photos.reading import Photo, open_mask, open_photo
from svfit_dreambooth.training.answers import ask_prompts, asking, photo_captions, run_prompts
from svfit_dreambooth.training.base_pictures import base_latents, kept_prompts
from svfit_dreambooth.training.class_pictures import paint_class_pictures
from svfit_dreambooth.training.plan import Plan


@dataclass
class Examples:
    """Photos as the denoiser sees them, on the CPU, latents in float32; lists go by photo."""

    mean: list[Tensor]  # (variants, channels, h, w), mean of the latents of every window and mirror image
    spread: list[Tensor]  # the same shape: their standard deviation
    weight: list[Tensor | None]  # (variants, 1, h, w), of the loss, where a mask asks for one
    time_ids: list[Tensor]  # (variants, 6), where the windows were, see `Family.predict`
    prompts: list[list[int]]  # which rows of the following are the photo's captions: one of them is drawn
    tokens: Tokens  # (prompts, tokens) for each text encoder that may be trained
    conditions: Conditions  # (prompts, ...) each
    repeats: list[int] | None = None  # how often each photo is shown in a round; None: each once
    dropped: int | None = None  # the row of the empty prompt; None: captions are never dropped
    prior: Examples | None = None  # the class pictures; None: without prior preservation
    base: Examples | None = None  # what the base painted itself; None: without keep_base


def make_class_pictures(plan: Plan, device: torch.device) -> list[Photo]:
    """The class pictures of the run, painted by the base on `device` as far as they are missing.

    The denoiser is left in the type in which the run trains it; `plan.weights()` taken before stay as they are stored.
    """
    config = plan.config
    return paint_class_pictures(
        Path(str(config.class_data_dir)),
        plan.base,
        str(config.class_prompt),
        config.num_class_images,
        seed=config.seed,
        device=device,
        dtype=MIXED_PRECISION[config.mixed_precision],
        height=config.resolution,
        width=config.resolution,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
    )


def encode_examples(plan: Plan, device: torch.device) -> Examples:
    """Encodes every window of every photo, and every caption, once; and what the run asks for beside them.

    Prompts first, then photos: a base that is opened one network at a time holds neither text encoder nor autoencoder
    when its denoiser is opened.
    """
    config = plan.config
    ask_prompts(plan, run_prompts(plan), device)
    examples = _encode(plan, plan.photos, str(config.instance_prompt), device)
    if config.with_prior_preservation:
        pictures = make_class_pictures(plan, device)
        examples.prior = _encode(plan, pictures, str(config.class_prompt), device, of_class=True)
    if config.keep_base:
        examples.base = encode_base_pictures(plan, device)
    return examples


@torch.no_grad()
def encode_base_pictures(plan: Plan, device: torch.device) -> Examples:
    """Pictures that the base painted itself, each with its prompt, of its class too where the run names one."""
    config = plan.config
    prompts, side = kept_prompts(plan.base.name, config.class_prompt), int(config.resolution or plan.base.resolution)
    dtype = MIXED_PRECISION[config.mixed_precision]
    latents = base_latents(plan.base, prompts, side, device, dtype, config.basis_cache_dir)  # (pictures, c, h, w)
    different = list(dict.fromkeys([*prompts, ""]))
    tokens, conditions = _read(plan, different, device)
    count = len(prompts)
    return Examples(
        list(latents[:, None]),
        [torch.zeros_like(latents[:1])] * count,
        [None] * count,
        [torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)] * count,
        [[different.index(prompt)] for prompt in prompts],
        tokens,
        conditions,
        dropped=different.index(""),
    )


@torch.no_grad()
def _encode(plan: Plan, photos: list[Photo], prompt: str, device: torch.device, of_class: bool = False) -> Examples:
    """`photos` with `prompt` where they have no caption.  Class pictures are many: one window each, and no masks."""
    config, family = plan.config, plan.base.family
    means: list[Tensor] = []
    spreads: list[Tensor] = []
    weights: list[Tensor | None] = []
    time_ids: list[Tensor] = []
    with asking(plan, ["vae"], device) as answer:
        for photo in photos:
            crops = crop_photo(
                open_photo(photo.path),
                plan.training_size(photo),
                None if of_class else open_mask(photo),
                config.center_crop,
                config.random_flip,
                1 if of_class else config.crops_per_photo,
                config.seed,
                photo.path.name,
            )
            pixels = hashlib.sha256(crops.pixel_values.numpy().tobytes()).hexdigest()
            latents = answer(["windows", list(crops.pixel_values.shape), pixels], partial(_latents, family, crops))
            means.append(latents["mean"])
            spreads.append(latents["spread"])
            time_ids.append(crops.time_ids)
            if crops.mask is None:
                weights.append(None)
            else:
                height, width = means[-1].shape[-2:]
                mask = adaptive_avg_pool2d(crops.mask, (height, width))  # (variants, 1, h, w)
                weights.append(config.unmasked_weight + (1 - config.unmasked_weight) * mask)
    captions = photo_captions(plan, photos, prompt, of_class)
    drops = config.caption_dropout_rate > 0 and not of_class
    different = list(dict.fromkeys([text for texts in captions for text in texts] + [""] * drops))
    tokens, conditions = _read(plan, different, device)
    return Examples(
        means,
        spreads,
        weights,
        time_ids,
        [[different.index(text) for text in texts] for texts in captions],
        tokens,
        conditions,
        [photo.repeats // math.gcd(*(each.repeats for each in photos)) for photo in photos],
        different.index("") if drops else None,
    )


def _latents(family: Family, crops: Crops) -> dict[str, Tensor]:
    """Mean and spread of the latents of every window, (variants, channels, h, w) each."""
    mean, spread = zip(*(family.encode_images(window[None]) for window in crops.pixel_values), strict=True)
    return {"mean": torch.cat(mean).cpu(), "spread": torch.cat(spread).cpu()}


def _read(plan: Plan, prompts: list[str], device: torch.device) -> tuple[Tokens, Conditions]:
    """The prompts' tokens, for text encoders that are trained, and what the denoiser is told of them."""
    family = plan.base.family
    if not family.adaptable_text_encoders:
        return {}, family.conditions(prompts)
    for encoder in family.text_encoders.values():
        encoder.to(device).eval()
    tokens = family.tokenize(prompts)
    conditions = family.encode_tokens({name: ids.to(device) for name, ids in tokens.items()}, family.text_encoders)
    return tokens, {name: rows.float().cpu() for name, rows in conditions.items()}
