"""LoRA files: the two matrices of a layer, packed into either layout, and read back.

One alpha in every layer: diffusers drops alphas that differ between layers, so the rank is folded into the matrices.
kohya files then mean alpha / rank * up @ down with the same alpha throughout; diffusers files have no alpha, mean
B @ A, and repeat that in `lora_adapter_metadata` for versions that would take one layer's rank for all.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svfit_dreambooth.adapter.checks import container
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.lora_names import DOWN, UP, Layout, Place


def pack_layer(
    stem: str,
    U: Tensor,
    shift: Tensor,
    Vh: Tensor,
    layout: Layout,
    alpha: float,
    dtype: torch.dtype,
    kernel: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """The tensors of the layer `stem` whose change is U (out, rank) diag(shift (rank,)) Vh (rank, in).

    On the CPU.  `kernel`: (in, h, w) of a convolution, whose Vh is (rank, in * h * w); empty for a linear layer.

    The square root of |shift| goes to either side, so that float16 has digits for both.
    """
    U, shift, Vh = (tensor.cpu().double() for tensor in (U, shift, Vh))  # Apple's MPS has no float64
    rank = len(shift)
    fold = rank / alpha if layout == "kohya" else 1.0
    root = (shift.abs() * fold).sqrt()  # (rank,)
    up = U * (root * shift.sign())  # (out, rank)
    down = root[:, None] * Vh  # (rank, in)
    if kernel:
        up, down = up[:, :, None, None], down.view(rank, *kernel)  # two convolutions, the second of single places
    tensors = {f"{stem}.{DOWN[layout]}": down, f"{stem}.{UP[layout]}": up}
    tensors = {key: value.to(dtype).contiguous() for key, value in tensors.items()}
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise SVFitError(f"{key} does not fit into {str(dtype)[6:]}: export with dtype float32.", "dtype")
    if layout == "kohya":
        tensors[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return tensors


def peft_metadata(ranks: Mapping[str, int]) -> str:
    """`lora_adapter_metadata` of a diffusers file: LoraConfig's fields, "<component>.<field>", as JSON.

    Names are without `text_model.`, which some versions of transformers have and others lack: PEFT compares endings.
    """
    fields: dict[str, Any] = {}
    for component in sorted({name.partition(".")[0] for name in ranks}):
        own = {
            name.partition(".")[2].removeprefix("text_model."): rank
            for name, rank in ranks.items()
            if name.startswith(component + ".")
        }
        most = max(own.values())
        others = {name: rank for name, rank in own.items() if rank != most}
        fields |= {
            f"{component}.r": most,
            f"{component}.lora_alpha": most,
            f"{component}.rank_pattern": others,
            f"{component}.alpha_pattern": others,
            f"{component}.target_modules": sorted(own),
        }
    return json.dumps(fields, sort_keys=True)


def lora_changes(
    path: Path, names: Mapping[str, tuple[int, int]], layout: Layout, places: Mapping[str, Place]
) -> Iterator[tuple[str, Tensor]]:
    """Layer by layer what the file at `path` adds to the weight, (out, in) float32, as loaders compute it.

    `names`: the layers expected, with their shapes (out, in), where in is in * h * w for convolutions.  `places`: where
    they are, see `lora_places`.  Raises
    SVFitError if the file holds others, or misses or misshapes one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            suffixes = [DOWN[layout], UP[layout], *(["alpha"] if layout == "kohya" else [])]
            expected = {f"{places[name].stem}.{suffix}" for name in names for suffix in suffixes}
            if keys != expected:
                raise SVFitError(f"{path} holds other tensors than were exported: {min(keys ^ expected)}.")
            for name, (out, into) in names.items():
                stem, first = places[name].stem, places[name].first
                down = file.get_tensor(f"{stem}.{DOWN[layout]}").float().flatten(1)  # (rank, in)
                up = file.get_tensor(f"{stem}.{UP[layout]}").float().flatten(1)  # (out, rank)
                rank = down.shape[0]
                if up.shape != (places[name].rows or out, rank) or down.shape != (rank, into):
                    raise SVFitError(f"{path} holds {stem} with the shapes {tuple(up.shape)} and {tuple(down.shape)}.")
                scale = file.get_tensor(f"{stem}.alpha").item() / rank if layout == "kohya" else 1.0
                yield name, scale * (up[first : first + out] @ down)
    except (SafetensorError, OSError) as error:
        raise SVFitError(f"{path} cannot be read back ({error}): is the disk full?") from error


def is_lora(path: Path) -> bool:
    """Whether the file at `path` is a safetensors file that holds a LoRA.  Raises SVFitError as `check_container`."""
    with container(path) as file:
        return any(key.endswith(tuple(DOWN.values())) for key in file.keys())  # noqa: SIM118


def describe_lora(path: Path) -> dict[str, Any]:
    """What a LoRA file holds, from its header alone: layout, layers, ranks, alphas, dtype, bytes and metadata."""
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        layout = "kohya" if any(key.endswith(DOWN["kohya"]) for key in keys) else "diffusers"
        downs = [file.get_slice(key) for key in keys if key.endswith(DOWN[layout])]  # type: ignore[index]
        ranks = [entry.get_shape()[0] for entry in downs]
        alphas = sorted({file.get_tensor(key).item() for key in keys if key.endswith(".alpha")})
        return {
            "layout": layout,
            "layers": len(ranks),
            "rank_min": min(ranks),
            "rank_max": max(ranks),
            "alphas": alphas,
            "dtype": downs[0].get_dtype(),
            "file_bytes": path.stat().st_size,
            "metadata": dict(file.metadata() or {}),
        }
