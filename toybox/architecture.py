"""What the toybox model is made of, and how its parts become an ordinary Stable Diffusion pipeline folder."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from toybox.tokenizer import save_tokenizer

WEIGHTS = Path(__file__).parent / "weights"
IMAGE_SIZE = 64  # pixels a side
LATENT_SIZE = 16  # the autoencoder shrinks pictures four times
LATENT_CHANNELS = 20  # of the 48 numbers in 4x4 pixels; with 12, stripes and eyes came back blurred


@dataclass(frozen=True)
class Sizes:
    """Widths and depths; the defaults are those of the shipped weights."""

    autoencoder_width: int = 48
    encoder_blocks: tuple[int, ...] = (0, 0, 0)  # no residual blocks: the encoder is linear, see stages.fit_encoder
    decoder_blocks: tuple[int, ...] = (3, 2, 0)  # residual blocks at 16, 32 and 64 pixels
    text_width: int = 192
    text_layers: int = 3
    text_heads: int = 4
    unet_channels: tuple[int, ...] = (64, 128, 192)  # at 16, 8 and 4 latent pixels
    unet_heads: tuple[int, ...] = (1, 2, 3)


FULL = Sizes()
TINY = Sizes(48, (0, 0, 0), (1, 0, 0), 16, 1, 2, (16, 16), (1, 1))  # for smoke tests


def build_autoencoder(sizes: Sizes = FULL) -> AutoencoderTiny:
    """An untrained autoencoder: (batch, 3, 64, 64) in [-1, 1] to latents (batch, 20, 16, 16) and back."""
    width = (sizes.autoencoder_width,) * len(sizes.encoder_blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=width,
        decoder_block_out_channels=width,
        num_encoder_blocks=sizes.encoder_blocks,
        num_decoder_blocks=sizes.decoder_blocks,
        latent_channels=LATENT_CHANNELS,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, sizes: Sizes = FULL) -> CLIPTextModel:
    """An untrained CLIP text encoder for the tokenizer's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text_width,
        intermediate_size=4 * sizes.text_width,
        projection_dim=sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet(sizes: Sizes = FULL) -> UNet2DConditionModel:
    """An untrained UNet with self- and cross-attention in every stage but the deepest, as Stable Diffusion 1.x."""
    attending = len(sizes.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        down_block_types=(*("CrossAttnDownBlock2D",) * attending, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * attending),
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.unet_heads,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Velocity prediction (Salimans and Ho, 2022) on a cosine schedule, sampled from its very end."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def assemble(
    vae: AutoencoderTiny, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The pipeline that anyone's Stable Diffusion code can use."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline in half precision. `folder` is replaced at the end, so that it is never half written."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(partial, safe_serialization=True)
    save_tokenizer(pipeline.tokenizer, partial / "tokenizer")
    config = partial / "text_encoder" / "config.json"
    # transformers loads in the recorded precision, diffusers in float32: the two must agree.
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float32"}, indent=2) + "\n")
    replace_folder(partial, folder)


def replace_folder(source: Path, target: Path) -> None:
    """Move `source` to `target`, whatever was there before."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    shutil.rmtree(old, ignore_errors=True)


def load_pipeline(folder: Path = WEIGHTS) -> StableDiffusionPipeline:
    """Open an exported folder in single precision."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
