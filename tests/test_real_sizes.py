"""The memory estimate at the sizes of published bases, from their configs alone, against reckoning by hand."""

import shutil
from typing import NamedTuple

import pytest
import torch
from flow_bases import BASES

from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.estimate import estimate_memory
from svfit_dreambooth.training.plan import prepare

FLUX_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
SDXL_VAE = FLUX_VAE | {"latent_channels": 4, "scaling_factor": 0.13025, "shift_factor": None}
DEEP_VAE = {
    "latent_channels": 32,
    **{f"{part}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3 for part in ("encoder", "decoder")},
    **{f"{part}_block_out_channels": (128, 256, 512, 512, 1024, 1024) for part in ("encoder", "decoder")},
    **{f"{part}_qkv_multiscales": ((), (), (), (5,), (5,), (5,)) for part in ("encoder", "decoder")},
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
}
QWEN3_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN2_5_VL_7B = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
}
QWEN3_VL_4B = {
    "text_config": QWEN3_4B
    | {"rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6}},
    "vision_config": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560},
}
GEMMA2_2B = {}  # its class's defaults
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_G |= {"projection_dim": 1280}
SD3_5_LARGE = {
    "sample_size": 128,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "qk_norm": "rms_norm",
}
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}


class Real(NamedTuple):
    """A published base: billions of weights as its authors count them, and what follows from its report."""

    transformer: dict
    vae: dict
    encoders: list[dict]
    weights: float  # billions, of the denoiser
    read: float  # billions, of the text encoders
    blocks: int
    tokens: int  # of a picture of 512 pixels and its prompt, as far as both go through the blocks
    width: int


REAL = {
    "klein": Real(KLEIN_4B, {}, [QWEN3_4B], 3.88, 4.02, 5 + 20, 32 * 32 + 512, 3072),
    "z-image": Real({}, FLUX_VAE, [QWEN3_4B], 6.15, 4.02, 30 + 4, 32 * 32 + 512, 3840),
    "qwen-image": Real({}, {}, [QWEN2_5_VL_7B], 20.4, 8.29, 60, 32 * 32 + 1024, 3072),
    "flux-1": Real({"guidance_embeds": True}, FLUX_VAE, [CLIP_L, T5_XXL], 11.9, 4.88, 19 + 38, 32 * 32 + 512, 3072),
    "sd3": Real(SD3_5_LARGE, FLUX_VAE, [CLIP_L, CLIP_G, T5_XXL], 8.06, 5.58, 38, 32 * 32 + 77 + 256, 2432),
    "chroma": Real({}, FLUX_VAE, [T5_XXL], 8.9, 4.76, 19 + 38, 32 * 32 + 512, 3072),
    # two of its blocks read twelve layers of the prompt side by side
    "krea2": Real({}, {}, [QWEN3_VL_4B], 12.8, 4.44, 28 + 2, 32 * 32 + 512, 6144),
    "lumina2": Real({"cap_feat_dim": 2304}, FLUX_VAE, [GEMMA2_2B], 2.61, 2.61, 26 + 4, 32 * 32 + 256, 2304),
    "sana": Real({}, DEEP_VAE, [GEMMA2_2B], 1.6, 2.61, 20, 16 * 16, 2240),
    "pixart": Real(
        {"caption_channels": 4096, "use_additional_conditions": False},
        SDXL_VAE,
        [T5_XXL],
        0.61,
        4.76,
        28,
        32 * 32,
        1152,
    ),
}


@pytest.mark.parametrize(
    "name", [name if name == "pixart" else pytest.param(name, marks=pytest.mark.slow) for name in REAL]
)
def test_a_dry_run_at_full_size(name, tmp_path, photo_folder):
    real, pipeline = REAL[name], BASES[name]()
    pipeline.save_pretrained(tmp_path / "base")
    for part in ("transformer", "vae"):
        shutil.rmtree(tmp_path / "base" / part)
        with torch.device("meta"):
            type(getattr(pipeline, part))(**getattr(real, part)).save_config(tmp_path / "base" / part)
    encoders = [part for part in pipeline.components if part.startswith("text_encoder")]
    for part, config in zip(encoders, real.encoders, strict=True):
        shutil.rmtree(tmp_path / "base" / part)
        type(getattr(pipeline, part).config)(**config).save_pretrained(tmp_path / "base" / part)
    config = TrainConfig(
        pretrained_model_name_or_path=str(tmp_path / "base"),
        instance_data_dir=str(photo_folder),
        instance_prompt="a photo of sks dog",
        output_dir=str(tmp_path / "run"),
        resolution=512,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        validation_steps=0,
        dry_run=True,
    )
    found = estimate_memory(prepare(config, weightless=True))
    assert found.networks == pytest.approx(2e9 * real.weights, rel=0.03)
    assert found.before["prompts"] == pytest.approx(2e9 * real.read, rel=0.03)
    # every block keeps what goes into it; the largest also its own tensors, some tens of that
    inputs = 2 * real.tokens * real.width
    assert real.blocks * inputs < found.activations < (real.blocks + 80) * inputs
    if name == "klein":  # a square of the short side for each layer, and both sides of the small values
        short = 2 * (5 * 8 + 20 * 2) * 3072**2
        assert short < found.bases < 1.2 * short
