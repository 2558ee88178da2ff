"""Names of LoRA tensors for SDXL, against the real classes and the public loader's own conversion."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.decomposition import as_matrix
from svfit_dreambooth.method.targets import matrix_layers
from svfit_dreambooth.sharing.lora_file import pack_layer
from svfit_dreambooth.sharing.lora_names import lora_name

LAYERS_PER_BLOCK = 2


def sdxl_unet():
    """SDXL's UNet in small: the same blocks and names."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 8),
        layers_per_block=LAYERS_PER_BLOCK,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 2, 2),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
        cross_attention_dim=24,
        norm_num_groups=4,
    )


@pytest.mark.parametrize(
    ("path", "name"),
    [  # as in files that sd-scripts wrote for SDXL
        ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        ("unet.down_blocks.2.attentions.1.proj_in", "input_blocks_8_1_proj_in"),
        ("unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0", "middle_block_1_transformer_blocks_9_attn2_to_out_0"),
        ("unet.up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj", "output_blocks_2_1_transformer_blocks_9_ff_net_0_proj"),
        ("unet.up_blocks.1.attentions.0.proj_out", "output_blocks_3_1_proj_out"),
        ("unet.down_blocks.0.resnets.1.time_emb_proj", "input_blocks_2_0_emb_layers_1"),
        ("unet.mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
        ("unet.conv_in", "input_blocks_0_0"),
        ("unet.down_blocks.1.downsamplers.0.conv", "input_blocks_6_0_op"),
        ("unet.up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("unet.up_blocks.2.resnets.2.conv2", "output_blocks_8_0_out_layers_3"),
        ("unet.up_blocks.0.resnets.0.conv_shortcut", "output_blocks_0_0_skip_connection"),
        ("unet.time_embedding.linear_2", "time_embed_2"),
        ("unet.add_embedding.linear_1", "label_emb_0_0"),
    ],
)  # fmt: skip
def test_stability_names(path, name):
    assert lora_name(path, "kohya", LAYERS_PER_BLOCK) == "lora_unet_" + name


def test_text_encoders():
    path = "text_model.encoder.layers.3.self_attn.q_proj"
    flat = path.replace(".", "_")
    assert lora_name("text_encoder." + path, "kohya") == "lora_te_" + flat
    assert lora_name("text_encoder." + path, "kohya", 2) == "lora_te1_" + flat
    assert lora_name("text_encoder_2." + path, "kohya", 2) == "lora_te2_" + flat
    assert lora_name("text_encoder_2." + path, "diffusers", 2) == "text_encoder_2." + path


def test_what_has_no_name():
    with pytest.raises(SVFitError, match="no name for 'transformer'"):
        lora_name("transformer.blocks.0.to_q", "kohya")
    with pytest.raises(SVFitError, match="the original layout has no name for 'nowhere.to_q'"):
        lora_name("unet.nowhere.to_q", "kohya", 2)


def test_the_public_loader_finds_every_layer_of_sdxl():
    """Its conversion of a kohya file must lead back to the layers that the matrices came from."""
    torch.manual_seed(0)
    unet = sdxl_unet()
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    )
    tensors, changes = {}, {}
    models = {"unet": unet, "text_encoder_2": encoder}
    for component, model in models.items():
        for name, (_, _, layer) in matrix_layers(model).items():
            if component == "text_encoder_2" and "self_attn" not in name:
                continue
            U, S, Vh = torch.linalg.svd(torch.randn(as_matrix(layer.weight).shape), full_matrices=False)
            rank = 1 + len(changes) % 3
            changes[component, name] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
            stem = lora_name(f"{component}.{name}", "kohya", LAYERS_PER_BLOCK)
            factors = (U[:, :rank], S[:rank], Vh[:rank])
            kernel = layer.weight.shape[1:] if layer.weight.ndim == 4 else ()
            tensors |= pack_layer(stem, *factors, "kohya", 3.0, torch.float32, kernel)
    assert len(changes) > 80
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=unet.config)[:2]
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
    StableDiffusionXLPipeline.load_lora_into_text_encoder(state, alphas, encoder, prefix="text_encoder_2")
    found = 0
    for component, model in models.items():
        loaded = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
        for (owner, name), change in changes.items():
            if owner == component:
                layer = loaded.get(name) or loaded[name.removeprefix("text_model.")]
                assert torch.allclose(as_matrix(layer.get_delta_weight("default_0")), change, atol=1e-5), name
                found += 1
    assert found == len(changes)


class WithoutFloat64(torch.Tensor):
    """As on Apple's MPS; on the CPU it is a tensor like others."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_factors_from_a_device_without_float64():
    U, S, Vh = torch.linalg.svd(torch.randn(4, 6), full_matrices=False)
    given = (factor.as_subclass(WithoutFloat64) for factor in (U, S, Vh))
    down, up = pack_layer("unet.mid_block.attentions.0.proj_in", *given, "diffusers", 1.0, torch.float32).values()
    assert torch.allclose(up @ down, (U * S) @ Vh, atol=1e-5)
