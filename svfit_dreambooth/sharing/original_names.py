"""The names that Stable Diffusion's original code gives to the parts of a model, which most generators still read.

There, the UNet's blocks are numbered through: every level has `layers_per_block` pairs of residual block (0) and
transformer (1), one more in the decoder, and a resampling step; the encoder begins with the convolution
`input_blocks.0`.  The autoencoder's decoder counts its levels from the outside, and its attention is made of
convolutions of single points.  Text encoders of OpenCLIP hold query, key and value in one matrix.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from svfit_dreambooth.errors import SVFitError

OUTSIDE = {  # diffusers' name of a UNet layer outside the blocks -> the original one
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
RESIDUAL = {  # the same within a residual block
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
AUTOENCODER = {  # in this order
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "attn_1.group_norm": "attn_1.norm",
    "attn_1.to_q": "attn_1.q",
    "attn_1.to_k": "attn_1.k",
    "attn_1.to_v": "attn_1.v",
    "attn_1.to_out.0": "attn_1.proj_out",
    "resnets.": "block.",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
LOGIT_SCALE = math.log(100)  # of every trained CLIP; nothing that paints reads it


def unet_path(path: str, layers_per_block: int, up_attention: bool = True) -> str:
    """The original path of the layer at `path` of diffusers' UNet.

    `up_attention`: whether its block has attention, which stands before an upsampler.
    """
    if path in OUTSIDE:
        return OUTSIDE[path]
    step = layers_per_block + 1
    match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(?:downsamplers|upsamplers)\.0\.conv", path)
    if match:
        end = (int(match[2]) + 1) * step
        return (
            f"input_blocks.{end}.0.op"
            if match[1] == "down_blocks"
            else f"output_blocks.{end - 1}.{1 + up_attention}.conv"
        )
    match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(attentions|resnets)\.(\d+)\.(.+)", path)
    if match:
        side, block, kind, layer, rest = match.groups()
        number = int(block) * step + int(layer) + (1 if side == "down_blocks" else 0)
        place = f"{'input_blocks' if side == 'down_blocks' else 'output_blocks'}.{number}"
        place += ".1" if kind == "attentions" else ".0"
    else:
        match = re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)", path)
        if not match:
            raise SVFitError(f"the original layout has no name for {path!r}: export in the diffusers layout.")
        kind, layer, rest = match.groups()
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}"
    return f"{place}.{RESIDUAL.get(rest, rest)}"


def unet_tensors(state: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """The weights of a UNet, by original names."""
    attention = {match[1] for key in state if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}
    renamed = {}
    for key, tensor in state.items():
        path, _, kind = key.rpartition(".")
        block = re.match(r"up_blocks\.(\d+)\.", key)
        renamed[f"{unet_path(path, layers_per_block, block is None or block[1] in attention)}.{kind}"] = tensor
    return renamed


def autoencoder_tensors(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The weights of an AutoencoderKL of so many levels, by original names."""
    renamed = {}
    for key, tensor in state.items():
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
        for ours, theirs in AUTOENCODER.items():
            name = name.replace(ours, theirs)
        point = ".attn_1." in name and tensor.ndim == 2
        renamed[name] = tensor[:, :, None, None] if point else tensor
    return renamed


def clip_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a text encoder of OpenAI's CLIP: as transformers named them for long, with a level more."""
    return {f"transformer.text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}


def open_clip_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a text encoder of OpenCLIP, by its own names.

    A model that is cut before its last layer, as Stable Diffusion 2 is read, gets that back, without meaning, and a
    projection: the original code makes them before it reads the file.
    """
    state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if key == "text_projection.weight":
            renamed["text_projection"] = tensor.T
        elif ".q_proj." in key:
            parts = [state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in key and ".v_proj." not in key:
            renamed[name] = tensor
    if "text_projection" not in renamed:
        layers = 1 + max(int(match[1]) for key in renamed if (match := re.search(r"resblocks\.(\d+)\.", key)))
        last = f"resblocks.{layers - 1}."
        renamed |= {
            key.replace(last, f"resblocks.{layers}."): tensor.clone() for key, tensor in renamed.items() if last in key
        }
        renamed["text_projection"] = torch.eye(renamed["token_embedding.weight"].shape[1])
    return {f"model.{name}": tensor for name, tensor in (renamed | {"logit_scale": torch.tensor(LOGIT_SCALE)}).items()}
