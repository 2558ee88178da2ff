"""The names that LoRA files give to the layers of a model, as the programs that load such files expect them.

Two layouts.  "kohya" (sd-scripts; read by every generator): flat names with underscores,
`lora_unet_<path>.lora_down.weight` (rank, in), `.lora_up.weight` (out, rank) and `.alpha`, the layer's change being
alpha / rank * up @ down; of a convolution (rank, in, h, w) and (out, rank, 1, 1).  "diffusers": dotted names,
`<component>.<path>.lora_A.weight` and `.lora_B.weight`, change B @ A.  For SDXL, kohya files use the names of
Stability's own UNet (`input_blocks_4_1_...`).
"""

import re
from typing import Literal

from svfit_dreambooth.errors import SVFitError

Layout = Literal["kohya", "diffusers"]

DOWN = {"kohya": "lora_down.weight", "diffusers": "lora_A.weight"}
UP = {"kohya": "lora_up.weight", "diffusers": "lora_B.weight"}

STABILITY_NAMES = {  # diffusers' name of a UNet layer outside the blocks -> Stability's
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
STABILITY_RESIDUAL = {  # the same within a residual block
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def lora_name(name: str, layout: Layout, sdxl_layers_per_block: int | None = None) -> str:
    """What a LoRA file calls the layer `name` ("<component>.<module path>", canonical), without the tensor's suffix.

    `sdxl_layers_per_block`: the UNet's `layers_per_block` if the model is an SDXL, else None.
    """
    if layout == "diffusers":
        return name
    component, _, path = name.partition(".")
    sdxl = sdxl_layers_per_block is not None
    prefix = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if sdxl else "lora_te",
        "text_encoder_2": "lora_te2",
    }.get(component)
    if prefix is None:
        raise SVFitError(f"kohya files have no name for {component!r} ({name}): export in the diffusers layout.")
    if component == "unet" and sdxl_layers_per_block is not None:
        path = stability_path(path, sdxl_layers_per_block)
    return f"{prefix}_{path.replace('.', '_')}"


def stability_path(path: str, layers_per_block: int) -> str:
    """The path that Stability's SDXL UNet gives to the layer at `path` of diffusers' one.

    There, blocks are numbered through: every level has `layers_per_block` pairs of residual block (0) and transformer
    (1), one more in the decoder, and a resampling step; the encoder begins with the convolution `input_blocks.0`.
    """
    if path in STABILITY_NAMES:
        return STABILITY_NAMES[path]
    step = layers_per_block + 1
    match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(?:downsamplers|upsamplers)\.0\.conv", path)
    if match:
        end = (int(match[2]) + 1) * step
        return f"input_blocks.{end}.0.op" if match[1] == "down_blocks" else f"output_blocks.{end - 1}.2.conv"
    match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(attentions|resnets)\.(\d+)\.(.+)", path)
    if match:
        side, block, kind, layer, rest = match.groups()
        number = int(block) * step + int(layer) + (1 if side == "down_blocks" else 0)
        place = f"{'input_blocks' if side == 'down_blocks' else 'output_blocks'}.{number}"
        place += ".1" if kind == "attentions" else ".0"
    else:
        match = re.fullmatch(r"mid_block\.(attentions|resnets)\.(\d+)\.(.+)", path)
        if not match:
            raise SVFitError(f"kohya files for SDXL have no name for {path!r}: export in the diffusers layout.")
        kind, layer, rest = match.groups()
        place = f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}"
    return f"{place}.{STABILITY_RESIDUAL.get(rest, rest)}"
