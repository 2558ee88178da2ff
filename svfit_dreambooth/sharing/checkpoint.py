"""A whole model as one file in the layout of Stable Diffusion's original code, for A1111, Forge, ComfyUI and their kin."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.bases.sdxl import SDXL
from svfit_dreambooth.bases.stable_diffusion import StableDiffusion
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.original_names import (
    autoencoder_tensors,
    clip_tensors,
    open_clip_tensors,
    unet_tensors,
)


def check_checkpoint(base: BaseModel) -> None:
    """Raises SVFitError for a base that the original layout has no names for."""
    family, vae = base.family, base.pipeline.vae
    if not isinstance(family, StableDiffusion):
        raise SVFitError(
            f"{base.name} is no Stable Diffusion 1.x, 2.x or XL, whose layout one file has: name a folder as the output."
        )
    if not isinstance(vae, AutoencoderKL):
        raise SVFitError(
            f"the autoencoder of {base.name} is an {type(vae).__name__}, for which the layout of one file has no names: "
            "name a folder as the output."
        )


def write_checkpoint(base: BaseModel, path: Path, metadata: dict[str, str]) -> None:
    """Writes all weights of `base`, in the types that they have, to `path`."""
    save_file({key: tensor.contiguous() for key, tensor in _tensors(base).items()}, path, metadata)


def read_checkpoint(path: Path, base: BaseModel, folder: Path) -> BaseModel:
    """The model in the file at `path`, read by diffusers with the configs of `base`, which are put into `folder`."""
    pipeline = base.pipeline
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if isinstance(part, PreTrainedModel):
            part.config.save_pretrained(folder / name)
        elif isinstance(part, ModelMixin):
            part.save_config(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)
    return open_base_model(str(path), base_config=str(folder), content_filter=False)


def _tensors(base: BaseModel) -> dict[str, Tensor]:
    pipeline: Any = base.pipeline
    levels = len(pipeline.vae.config.block_out_channels)
    parts = {
        "model.diffusion_model.": unet_tensors(pipeline.unet.state_dict(), pipeline.unet.config.layers_per_block),
        "first_stage_model.": autoencoder_tensors(pipeline.vae.state_dict(), levels),
    }
    marks: dict[str, Tensor] = {}
    if isinstance(base.family, SDXL):
        parts["conditioner.embedders.0."] = clip_tensors(pipeline.text_encoder.state_dict())
        parts["conditioner.embedders.1."] = open_clip_tensors(pipeline.text_encoder_2.state_dict())
        if base.family.prediction_type == "v":  # of SDXL, readers know it by these entries alone
            zero_snr = pipeline.scheduler.config.get("rescale_betas_zero_snr")
            marks = {name: torch.empty(0) for name in ("v_pred", *(["ztsnr"] if zero_snr else []))}
    elif base.architecture == "stable-diffusion-v2":
        parts["cond_stage_model."] = open_clip_tensors(pipeline.text_encoder.state_dict())
    else:
        parts["cond_stage_model."] = clip_tensors(pipeline.text_encoder.state_dict())
    dtype = base.family.denoiser.dtype
    tensors = {prefix + key: tensor for prefix, part in parts.items() for key, tensor in part.items()}
    made = {key: tensor.to(dtype) for key, tensor in tensors.items() if tensor.is_floating_point()}
    return tensors | made | marks
