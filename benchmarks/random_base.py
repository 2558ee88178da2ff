"""A base model of real size with random weights: time and memory do not depend on their values."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from svfit_dreambooth.bases.names import EMBEDDED_WEIGHTS


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


def stable_diffusion_15(seed: int = 0) -> StableDiffusionPipeline:
    """The same in the sizes of Stable Diffusion 1.5, without any file of it; the tokenizer is the embedded base's."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED_WEIGHTS / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=768,
        projection_dim=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            sample_size=512,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def random_base(config_dir: Path | None, folder: Path) -> Path:
    """Writes such a pipeline in float16, as checkpoints are published, into `folder`, unless one is there.

    `config_dir`: None takes `stable_diffusion_15`.
    """
    if not (folder / "model_index.json").is_file():
        made = stable_diffusion_15() if config_dir is None else random_pipeline(config_dir)
        made.to(torch.float16).save_pretrained(folder)
    return folder
