"""Opens the base model, and turns prompts and pictures into what its UNet works on."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from svfit_dreambooth.config import TOYBOX
from svfit_dreambooth.errors import SVFitError

logger = logging.getLogger(__name__)

TOYBOX_FOLDER = Path(__file__).resolve().parent.parent / "toybox" / "weights"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
GUIDANCE_SCALE = {TOYBOX: 4.0}  # where the value that suits is not Stable Diffusion's customary one
CUSTOMARY_GUIDANCE_SCALE = 7.5


@dataclass
class BaseModel:
    """A base model ready for use: a diffusers pipeline and the name that adapter files give it."""

    name: str  # "toybox", hub id with "@revision", or the name of a folder or file
    pipeline: StableDiffusionPipeline

    @property
    def resolution(self) -> int:
        """Side in pixels of the pictures that the base was trained on."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def size_multiple(self) -> int:
        """What both sides of a picture, in pixels, should be multiples of, for the UNet to halve them evenly."""
        return self.pipeline.vae_scale_factor * 2 ** (len(self.pipeline.unet.config.block_out_channels) - 1)

    @property
    def guidance_scale(self) -> float:
        """Guidance that suits the base."""
        return GUIDANCE_SCALE.get(self.name, CUSTOMARY_GUIDANCE_SCALE)

    @property
    def architecture(self) -> str:
        """ModelSpec's word for the family."""
        if self.name == TOYBOX:
            return TOYBOX
        width = self.pipeline.unet.config.cross_attention_dim
        return {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2"}.get(width, "stable-diffusion")


def pipeline_components(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """The modules of `pipeline` that adapters may change, by name."""
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipeline, name) for name in names if getattr(pipeline, name, None) is not None}


def check_base_model(name: str, base_config: str | None = None) -> None:
    """Raises SVFitError if `name` cannot be a base model; quick, opens no weights and asks no network."""
    if name == TOYBOX:
        if not (TOYBOX_FOLDER / "model_index.json").is_file():
            raise SVFitError(f"the embedded base model is missing: there is no {TOYBOX_FOLDER.name} folder in toybox/.")
        return
    path = Path(name)
    if path.is_dir():
        index = path / "model_index.json"
        try:
            kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            raise SVFitError(
                f"{name} is not a diffusers model folder, it has no readable model_index.json: "
                f'give such a folder, a hub id, a .safetensors checkpoint, or "{TOYBOX}".'
            ) from None
        if kind != StableDiffusionPipeline.__name__:
            raise SVFitError(f"{name} is a {kind}, and only {StableDiffusionPipeline.__name__} models can be adapted.")
    elif path.is_file():
        if path.suffix != ".safetensors":
            raise SVFitError(f"{name} is not a .safetensors checkpoint: convert it, pickled files are never opened.")
        if base_config is not None and not Path(base_config, "model_index.json").is_file():
            raise SVFitError(f"--base_config {base_config} is not a folder with a model_index.json.")
    elif not HUB_ID.fullmatch(name) or name.startswith("."):
        raise SVFitError(
            f"{name} is no base model: there is no such folder or file, and a hub id reads owner/name; "
            f'give one of these, or "{TOYBOX}".'
        )


def open_base_model(
    name: str = TOYBOX,
    *,
    revision: str | None = None,
    variant: str | None = None,
    base_config: str | None = None,
    content_filter: bool = True,
    local_files_only: bool = False,
) -> BaseModel:
    """The base model `name`: "toybox", a diffusers folder, a hub id, or a single-file .safetensors checkpoint.

    Weights are float32 on the CPU, whatever their file holds, so that bases are taken from the stored precision;
    cast and move the pipeline afterwards.  `content_filter`: load the safety checker where the base has one.
    `local_files_only`: never download.  Raises SVFitError for anything that is not such a model.
    """
    check_base_model(name, base_config)
    options: dict[str, Any] = {"dtype": torch.float32}
    if not content_filter:
        options |= {"safety_checker": None, "requires_safety_checker": False}
    path = TOYBOX_FOLDER if name == TOYBOX else Path(name)
    try:
        if path.is_file():
            config = base_config or None
            pipeline = StableDiffusionPipeline.from_single_file(
                str(path), config=config, local_files_only=local_files_only or config is not None, **options
            )
        elif path.is_dir():
            pipeline = StableDiffusionPipeline.from_pretrained(
                path, variant=variant, use_safetensors=True, local_files_only=True, **options
            )
        else:
            pipeline = StableDiffusionPipeline.from_pretrained(
                name,
                revision=revision,
                variant=variant,
                use_safetensors=True,
                local_files_only=local_files_only,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SVFitError(f"the base model {name} cannot be opened: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    display = name if not path.exists() or name == TOYBOX else path.resolve().stem if path.is_file() else path.name
    if revision is not None and not path.exists():
        display += f"@{revision}"
    return BaseModel(display or path.resolve().name, pipeline)


def encode_prompts(pipeline: StableDiffusionPipeline, prompts: list[str]) -> Tensor:
    """(prompts, tokens, dim): the text encoder's last hidden states; a prompt that is cut off is named in a warning."""
    tokenizer = pipeline.tokenizer
    length = tokenizer.model_max_length
    for prompt in prompts:
        count = len(tokenizer(prompt).input_ids)
        if count > length:
            logger.warning("the prompt %r has %d tokens, and only the first %d are read.", prompt, count, length)
    ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    return pipeline.text_encoder(ids.to(pipeline.text_encoder.device))[0]  # (prompts, tokens, dim)


@torch.no_grad()
def encode_images(pipeline: StableDiffusionPipeline, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
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


def noise_scheduler(pipeline: StableDiffusionPipeline) -> DDPMScheduler:
    """The noise schedule that the base was trained with."""
    return DDPMScheduler.from_config(pipeline.scheduler.config)
