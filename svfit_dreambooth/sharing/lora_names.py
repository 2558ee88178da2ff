"""The names that LoRA files give to the layers of a model, as the programs that load such files expect them.

Two layouts.  "kohya" (sd-scripts; read by every generator): flat names with underscores,
`lora_unet_<path>.lora_down.weight` (rank, in), `.lora_up.weight` (out, rank) and `.alpha`, the layer's change being
alpha / rank * up @ down; of a convolution (rank, in, h, w) and (out, rank, 1, 1).  "diffusers": dotted names,
`<component>.<path>.lora_A.weight` and `.lora_B.weight`, change B @ A.  For SDXL, kohya files use the names of
Stability's own UNet (`input_blocks_4_1_...`), and for transformers those of the base's original code, where query, key and value
of a block are one layer (`double_blocks_0_img_attn_qkv`): the change of ours is then some rows of the file's.
ComfyUI reads both layouts of transformers, by these very names.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.sdxl import SDXL
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.original_names import unet_path

Layout = Literal["kohya", "diffusers"]

DOWN = {"kohya": "lora_down.weight", "diffusers": "lora_A.weight"}
UP = {"kohya": "lora_up.weight", "diffusers": "lora_B.weight"}


@dataclass(frozen=True)
class Place:
    """Where a LoRA file has the change of a layer."""

    stem: str  # name of the file's layer, without the tensors' suffixes
    first: int = 0  # row of the file's layer at which ours begins
    rows: int | None = None  # of the file's layer; None: ours alone


def lora_places(names: Iterable[str], layout: Layout, family: Family) -> dict[str, Place]:
    """Where a LoRA file of a base of `family` has each of the layers `names`, canonical, with their component.

    Raises SVFitError for a layer that files of this layout have no name for.
    """
    sdxl = int(family.denoiser.config.layers_per_block) if isinstance(family, SDXL) else None
    return {
        name: _original_place(name, family)
        if layout == "kohya" and family.original_names
        else Place(lora_name(name, layout, sdxl))
        for name in names
    }


def _original_place(name: str, family: Family) -> Place:
    path = name.partition(".")[2]
    for original, parts in family.original_names.items():
        for number, part in enumerate(parts):
            match = re.fullmatch(re.escape(part).replace(r"\{\}", r"(\d+)"), path)
            if match is None:
                continue
            stem = "lora_unet_" + original.format(*match.groups()).replace(".", "_")
            layers = [family.denoiser.get_submodule(each.format(*match.groups())) for each in parts]
            sizes = [layer.weight.shape[0] for layer in layers]
            return Place(stem, sum(sizes[:number]), sum(sizes)) if len(parts) > 1 else Place(stem)
    raise SVFitError(f"kohya files have no name for {name}: export in the diffusers layout.")


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
