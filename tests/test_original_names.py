"""Names of Stable Diffusion's original code, for models of real size and against a writer of its own."""

import pytest
import torch
from conftest import tiny_pipeline, tiny_sdxl_pipeline
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from single_file import save_single_file
from transformers import CLIPTextConfig, CLIPTextModel

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.checkpoint import write_checkpoint
from svfit_dreambooth.sharing.original_names import autoencoder_tensors, open_clip_tensors, unet_path, unet_tensors

XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "count", "some"),
    [
        (
            {"cross_attention_dim": 768},
            686,
            {
                "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
                "input_blocks.3.0.op.weight": (320, 320, 3, 3),
                "middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
                "middle_block.2.in_layers.0.weight": (1280,),
                "output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
                "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
                "output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
                "out.2.weight": (4, 320, 3, 3),
            },
        ),
        (
            XL,
            1680,
            {
                "label_emb.0.0.weight": (1280, 2816),
                "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
                "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
            },
        ),
    ],
)
def test_networks_of_real_size(config, count, some):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    named = {key: tuple(tensor.shape) for key, tensor in unet_tensors(unet.state_dict(), 2).items()}
    assert len(named) == count == len(unet.state_dict()) and some.items() <= named.items()


def test_the_autoencoder_of_real_size():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    named = {key: tuple(tensor.shape) for key, tensor in autoencoder_tensors(vae.state_dict(), 4).items()}
    assert (
        len(named) == 248
        and {
            "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
            "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
            "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
            "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        }.items()
        <= named.items()
    )


def test_the_layer_that_stable_diffusion_2_does_not_read_is_there():
    config = CLIPTextConfig(
        vocab_size=10, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
    )
    with torch.device("meta"):
        state = CLIPTextModel(config).state_dict()
        named = open_clip_tensors(state)
    assert len(named) == 294
    assert named["model.transformer.resblocks.23.attn.in_proj_weight"].shape == (3072, 1024)
    assert {"model.text_projection", "model.logit_scale", "model.ln_final.weight", "model.positional_embedding"} <= set(
        named
    )


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sdxl_pipeline])
def test_the_whole_file_is_what_another_writer_makes(make, tmp_path):
    pipeline = make()
    write_checkpoint(BaseModel("tiny", pipeline), tmp_path / "a.safetensors", {})
    ours = load_file(tmp_path / "a.safetensors")
    theirs = load_file(save_single_file(pipeline, tmp_path / "b.safetensors"))
    assert set(ours) - set(theirs) <= {"conditioner.embedders.1.model.logit_scale"}
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_layers_without_an_original_name():
    with pytest.raises(SVFitError, match="no name for 'up_blocks.0.motion'"):
        unet_path("up_blocks.0.motion", 2)
