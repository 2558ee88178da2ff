"""A base model of real size with random weights: time and memory do not depend on their values."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def random_pipeline(config_dir: Path, seed: int = 0) -> StableDiffusionPipeline:
    """A float32 pipeline of the configs and the tokenizer in `config_dir`, a diffusers model folder."""
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(config_dir / "vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(config_dir / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(config_dir / "tokenizer"),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config_dir / "unet")),
        scheduler=DDIMScheduler.from_config(DDIMScheduler.load_config(config_dir / "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def random_base(config_dir: Path, folder: Path) -> Path:
    """Writes such a pipeline in float16, as checkpoints are published, into `folder`, unless one is there."""
    if not (folder / "model_index.json").is_file():
        random_pipeline(config_dir).to(torch.float16).save_pretrained(folder)
    return folder
