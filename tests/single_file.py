"""Pipelines as single-file checkpoints, in the layout of the original Stable Diffusion code."""

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj"}


def renamed(text, words):
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def unet_key(key, unet):
    parts, per_block = key.split("."), unet.config.layers_per_block + 1
    if parts[0] == "mid_block":
        place = 2 * int(parts[2]) + (parts[1] == "attentions")
        return f"middle_block.{place}." + rest(parts, 3)
    if parts[0] not in ("down_blocks", "up_blocks"):
        stem, _, end = key.rpartition(".")
        return f"{UNET[stem]}.{end}"
    block, kind, layer = int(parts[1]), parts[2], int(parts[3])
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * per_block}.0.op.{parts[-1]}"
    if kind == "upsamplers":
        attention = hasattr(unet.up_blocks[block], "attentions")
        return f"output_blocks.{(block + 1) * per_block - 1}.{2 if attention else 1}.conv.{parts[-1]}"
    place = int(kind == "attentions")
    if parts[0] == "down_blocks":
        return f"input_blocks.{1 + block * per_block + layer}.{place}." + rest(parts, 4)
    return f"output_blocks.{block * per_block + layer}.{place}." + rest(parts, 4)


def rest(parts, start):
    end = ".".join(parts[start:])
    return renamed(end, RESNET) if "resnets" in parts else end


def vae_entry(key, tensor, blocks):
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = key.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
    if "mid_block.attentions.0" in key:
        key = renamed(key.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
        tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    for i in range(blocks):
        key = key.replace(f"down_blocks.{i}.", f"down.{i}.").replace(f"up_blocks.{i}.", f"up.{blocks - 1 - i}.")
    key = key.replace("resnets.", "block.").replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    return key, tensor


def clip_entries(model, prefix):
    return {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in model.state_dict().items()}


def open_clip_entries(model, prefix):
    entries, state = {}, {k.removeprefix("text_model."): v for k, v in model.state_dict().items()}
    for key, tensor in state.items():
        if key == "text_projection.weight":
            entries[prefix + "text_projection"] = tensor.T
        elif key.startswith("embeddings.position"):
            entries[prefix + "positional_embedding"] = tensor
        elif key.startswith("embeddings.token"):
            entries[prefix + "token_embedding.weight"] = tensor
        elif key.startswith("final_layer_norm"):
            entries[prefix + key.replace("final_layer_norm", "ln_final")] = tensor
        elif ".q_proj." in key:
            joined = torch.cat([state[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")])
            stem, _, end = renamed(key.replace("encoder.layers", "transformer.resblocks"), OPEN_CLIP).partition(
                "q_proj."
            )
            entries[f"{prefix}{stem}in_proj_{end}"] = joined
        elif ".k_proj." not in key and ".v_proj." not in key:
            entries[prefix + renamed(key.replace("encoder.layers", "transformer.resblocks"), OPEN_CLIP)] = tensor
    return entries


def save_single_file(pipeline, path, open_clip=False, extra=None, metadata=None):
    """`open_clip`: the text encoder in the layout of SD 2.x; `extra`: further entries."""
    entries = {
        "model.diffusion_model." + unet_key(key, pipeline.unet): tensor
        for key, tensor in pipeline.unet.state_dict().items()
    }
    blocks = len(pipeline.vae.config.block_out_channels)
    for key, tensor in pipeline.vae.state_dict().items():
        name, tensor = vae_entry(key, tensor, blocks)
        entries["first_stage_model." + name] = tensor
    if isinstance(pipeline, StableDiffusionXLPipeline):
        entries |= clip_entries(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
        entries |= open_clip_entries(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    elif open_clip:
        entries |= open_clip_entries(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        entries |= clip_entries(pipeline.text_encoder, "cond_stage_model.transformer.")
    entries |= extra or {}
    save_file({key: tensor.contiguous().clone() for key, tensor in entries.items()}, path, metadata)
    return path
