"""The names that LoRA files give to the layers of a model, as the programs that load such files expect them.

Two layouts.  "kohya" (sd-scripts; read by every generator): flat names with underscores,
`lora_unet_<path>.lora_down.weight` (rank, in), `.lora_up.weight` (out, rank) and `.alpha`, the layer's change being
alpha / rank * up @ down; of a convolution (rank, in, h, w) and (out, rank, 1, 1).  "diffusers": dotted names,
`<component>.<path>.lora_A.weight` and `.lora_B.weight`, change B @ A.  For SDXL, kohya files use the names of
Stability's own UNet (`input_blocks_4_1_...`).
"""

from typing import Literal

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.original_names import unet_path

Layout = Literal["kohya", "diffusers"]

DOWN = {"kohya": "lora_down.weight", "diffusers": "lora_A.weight"}
UP = {"kohya": "lora_up.weight", "diffusers": "lora_B.weight"}


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
        path = unet_path(path, sdxl_layers_per_block)
    return f"{prefix}_{path.replace('.', '_')}"
