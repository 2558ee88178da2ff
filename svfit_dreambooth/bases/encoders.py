"""Prompts and pictures to what the UNet of a base works on, and back."""

import logging
from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from PIL import Image
from torch import Tensor, nn

from svfit_dreambooth.bases.opening import Pipeline

logger = logging.getLogger(__name__)


def tokenize(pipeline: Pipeline, prompts: list[str]) -> list[Tensor]:
    """(prompts, tokens) for every text encoder; a prompt that is cut off is named in a warning."""
    tokenizers = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
    found: list[Tensor] = []
    for tokenizer in [tokenizer for tokenizer in tokenizers if tokenizer is not None]:
        length = tokenizer.model_max_length
        for prompt in prompts if not found else []:
            count = len(tokenizer(prompt).input_ids)
            if count > length:
                logger.warning("the prompt %r has %d tokens, and only the first %d are read.", prompt, count, length)
        text = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        found.append(text.input_ids)
    return found


def encode_tokens(encoders: Sequence[nn.Module], input_ids: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """What the UNet is told of prompts: embeddings (prompts, tokens, dim) and SDXL's pooled ones (prompts, dim).

    `input_ids`: (prompts, tokens) for each of `encoders`.  One encoder gives its last hidden states.  Two give their
    last but one, side by side, and the second its pooled projection (Podell et al., 2023, arXiv 2307.01952).
    """
    if len(encoders) == 1:
        return encoders[0](input_ids[0])[0], None
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, input_ids, strict=True)]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1][0]


@torch.no_grad()
def encode_images(pipeline: Pipeline, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of the latents of `pixel_values` (n, 3, h, w) in [-1, 1], each (n, channels, h/f, w/f).

    They are in the UNet's unit (times the VAE's scaling factor); an autoencoder without posterior has spread 0.
    """
    vae = pipeline.vae
    encoded = vae.encode(pixel_values.to(vae.device, vae.dtype))
    if hasattr(encoded, "latent_dist"):
        mean, spread = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        mean, spread = encoded.latents, torch.zeros_like(encoded.latents)
    factor = vae.config.scaling_factor
    return mean.float() * factor, spread.float() * factor


@torch.no_grad()
def decode_latents(pipeline: Pipeline, latents: Tensor) -> list[Image.Image]:
    """The pictures of `latents` (n, channels, h, w) in the UNet's unit, decoded in the autoencoder's own precision."""
    vae = pipeline.vae
    latents = latents.to(get_module_execution_device(vae), vae.dtype)  # if offloaded, not where its weights wait
    pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    pipeline.maybe_free_model_hooks()
    if getattr(pipeline, "watermark", None) is not None:
        pixels = pipeline.watermark.apply_watermark(pixels)
    return pipeline.image_processor.postprocess(pixels, output_type="pil")
