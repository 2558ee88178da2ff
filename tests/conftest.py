"""Tiny pipelines built from configs: the real classes, random weights, no network."""

import copy
import functools
import gc
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="hub-")  # an empty one: nobody's models decide a test

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.plan import prepare
from toybox.tokenizer import build_tokenizer

pytest_plugins = ["web_stand_ins"]  # fixtures of the page's tests

torch.set_num_threads(1)  # the models are too small for more, and test runs share the machine


LONG = ("test_web_browser", "test_fleet")


def pytest_collection_modifyitems(items):
    """The longest come first: begun last, they would keep one process busy while the others have nothing left."""
    items.sort(key=lambda item: item.module.__name__ not in LONG)


def pytest_collection_finish():
    """What was imported stays: every run clears memory, which need not walk through all of torch each time."""
    gc.collect()
    gc.freeze()


WORDS = ["a", "photo", "of", "dog", "cat", "mug", "on", "the", "beach", "in", "snow", "sks"]


@functools.cache
def tiny_tokenizer():
    """One vocabulary for all: words of equal rank may come in another order when they are learned again."""
    return build_tokenizer(WORDS, max_length=77)


def tiny_unet(**changes):
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes})


def tiny_text_encoder(vocabulary_size, kind=CLIPTextModel, width=24):
    return kind(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=width,
            projection_dim=width,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def tiny_autoencoder():
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )


def tiny_pipeline(vae="kl", prediction_type="epsilon", seed=0):
    """A Stable Diffusion pipeline of a few thousand weights; `vae`: "kl" (AutoencoderKL) or "tiny" (AutoencoderTiny)."""
    torch.manual_seed(seed)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    if vae == "kl":
        autoencoder = tiny_autoencoder()
    else:
        autoencoder = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=tiny_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            prediction_type=prediction_type,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl_pipeline(seed=0):
    """The same for SDXL: two text encoders, pooled embeddings and time ids."""
    torch.manual_seed(seed)
    tokenizer = copy.deepcopy(tiny_tokenizer())
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_autoencoder(),
        text_encoder=tiny_text_encoder(len(tokenizer)),
        text_encoder_2=tiny_text_encoder(len(tokenizer), CLIPTextModelWithProjection, width=32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=24 + 32,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def offload_sequentially(model, device="cpu"):
    """What diffusers does, without accelerate's sharing of tied weights, which fails when both devices are the CPU."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    add_hook_to_module(model, AlignDevicesHook(device, io_same_device=True), append=True)
    attach_align_device_hook(model, execution_device=device, offload=True, weights_map=weights)


@pytest.fixture(scope="session")
def tiny_base_xl(tmp_path_factory):
    """Folder of a tiny SDXL pipeline."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-xl"
    tiny_sdxl_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a tiny pipeline with AutoencoderKL."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-kl"
    tiny_pipeline("kl").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base_v(tmp_path_factory):
    """Folder of a tiny pipeline with AutoencoderTiny that predicts v."""
    folder = tmp_path_factory.mktemp("bases") / "tiny-v"
    tiny_pipeline("tiny", "v_prediction", seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Three small photos of coloured noise."""
    folder = tmp_path_factory.mktemp("photos") / "my dog"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index, size in enumerate([(40, 30), (24, 36), (32, 32)]):
        pixels = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"photo {index}.png")
    return folder


@pytest.fixture
def tiny_options(tiny_base, photo_folder, tmp_path):
    """Options of a run on the tiny base with those photos, that paints nothing at its end."""
    return {
        "pretrained_model_name_or_path": str(tiny_base),
        "instance_data_dir": str(photo_folder),
        "instance_prompt": "a photo of sks dog",
        "output_dir": str(tmp_path / "the run"),
        "resolution": 16,
        "train_batch_size": 2,
        "final_pictures": False,
    }


@pytest.fixture
def tiny_run(tiny_base, photo_folder, tmp_path):
    """A function of options to a prepared run on the tiny base with those photos."""

    def make(**options):
        common = {
            "pretrained_model_name_or_path": str(tiny_base),
            "instance_data_dir": str(photo_folder),
            "instance_prompt": "a photo of sks dog",
            "output_dir": str(tmp_path),
            "resolution": 16,
        }
        return prepare(TrainConfig(**common | options))

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("SVFIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
