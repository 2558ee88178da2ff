"""The adapter that comes nearest to a LoRA.

A LoRA changes a weight by any D = s B A of a low rank; an adapter moves along the base's own directions alone,
D' = U diag(shift) Vh.  The nearest such change, in the Frobenius norm, has shift_i = u_i^T D v_i, and what it misses is
sqrt(1 - |shift|^2 / |D|^2).  Of a change that has nothing to do with these directions a k-th of its square lies along
them, k being the number of singular values: next to nothing.  A LoRA that was made from an adapter comes back whole.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, isfinite
from tqdm.auto import tqdm

from svfit_dreambooth.adapter.checks import check_container, container, other_kind
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint, model_basis
from svfit_dreambooth.method.decomposition import as_matrix
from svfit_dreambooth.method.targets import canonical_name, check_plain, matrix_layers
from svfit_dreambooth.sharing.imports import Import, kinds, shares
from svfit_dreambooth.sharing.lora_names import lora_places

# what ends the name of a layer, in kohya's layout, PEFT's, and two older ones of diffusers
PARTS = (
    (
        re.compile(r"(?:\.lora_down|\.lora_A|\.lora\.down|\.lora_linear_layer\.down|_lora\.down)(?:\.\w+)?\.weight$"),
        "down",
    ),
    (re.compile(r"(?:\.lora_up|\.lora_B|\.lora\.up|\.lora_linear_layer\.up|_lora\.up)(?:\.\w+)?\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
)
OTHER_METHODS = {"LoHa", "LoKr"}
DORA = re.compile(r"dora_scale|lora_magnitude_vector")
MOST_LOST = 0.5  # beyond that the adapter is nearer to the base than to the LoRA, as good as


def import_lora(
    path: str | Path, base: BaseModel, *, partial: bool = False, basis_cache_dir: str | Path | None = None
) -> Import:
    """The adapter for `base` that comes nearest to the LoRA at `path`, in kohya's, diffusers' or PEFT's layout.

    `partial`: take it although more than half of the change is lost, or tensors have no place in an adapter; else
    such a file is refused.  PEFT's adapter_config.json is read where it lies beside the file.
    Raises SVFitError for LoHa, LoKr and DoRA, and for layers that `base` lacks.
    """
    path = Path(path)
    tensors, metadata = _read(path)
    settings = _settings(path, metadata)
    spelled = _spellings(base)
    layers: dict[str, dict[str, Tensor]] = {}
    unfit: dict[str, str] = {}
    for key, tensor in tensors.items():
        stem, part = _split(key)
        if part is None:
            unfit[key] = f"{key.rpartition('.')[2]} tensors"
        elif stem in spelled:
            for name, own in spelled[stem]:
                layers.setdefault(name, {})[part] = tensor[own] if part == "up" else tensor
        else:
            raise SVFitError(f"{path} changes {stem}, which {base.name} lacks: name the base that it was made for.")
    if unfit and not partial:
        raise SVFitError(
            f"{len(unfit)} of {len(tensors)} tensors in {path} do not fit an adapter ({kinds(unfit)}): add partial to "
            "take over the others alone.",
            "partial",
        )
    layers = {name: parts for name, parts in layers.items() if "up" not in parts or parts["up"].any()}
    if not layers:
        raise SVFitError(f"{path} changes nothing of {base.name}: every matrix in it is zero.")
    changes = {name: _change(path, name, parts, settings) for name, parts in layers.items()}
    weights = _weights(base, changes)
    shifts, lost = _project(changes, weights, basis_cache_dir)
    by_component = {key: value for key, value in lost.items() if key}
    if lost[""] > MOST_LOST and not partial:
        raise SVFitError(
            f"as an adapter {path} loses {lost['']:.2%} of its change ({shares(by_component)}), since adapters move "
            "along the base's own directions alone: add partial to take what is left, or load the LoRA itself.",
            "partial",
        )
    clip_skip = metadata.get("ss_clip_skip", "")
    adapter = Adapter(
        shifts=shifts,
        base_model=base.name,
        base_fingerprint=fingerprint(weights),
        instance_prompt=metadata.get("modelspec.trigger_phrase"),
        training={
            "imported_from": "LoRA", "left_out": len(unfit), "lost": round(lost[""], 5),
            **({"clip_skip": int(clip_skip) - 1} if clip_skip.isdecimal() and 1 < int(clip_skip) < 100 else {}),
        },
        architecture=base.architecture,
    )  # fmt: skip
    return Import(adapter, unfit, lost[""], by_component)


def kin_of_lora(path: Path) -> bool:
    """Whether the file at `path` holds a LoRA, or one of the kinds that are taken for one; see `check_container`."""
    check_container(path)
    with suppress(SafetensorError, OSError, ValueError), safe_open(path, framework="pt") as file:
        return other_kind(file) in {"LoRA", *OTHER_METHODS}
    return False


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in float32, checked, and the metadata."""
    with container(path) as file:
        keys, metadata = list(file.keys()), dict(file.metadata() or {})
        kind = other_kind(file)
        if kind in OTHER_METHODS or any(DORA.search(key) for key in keys):
            raise SVFitError(
                f"{path} is a {kind if kind in OTHER_METHODS else 'DoRA'}, whose change is no product of two "
                "matrices: only plain LoRAs are imported."
            )
        tensors = {key: file.get_tensor(key).float() for key in keys}
    for key, tensor in tensors.items():
        if not isfinite(tensor).all():
            raise SVFitError(f"{key} in {path} holds NaN or infinity: the file cannot be used.")
    return tensors, metadata


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's settings, from the file beside it or from what diffusers puts into the header; empty without."""
    beside = path.with_name("adapter_config.json")
    try:
        text = beside.read_text(encoding="utf-8") if beside.is_file() else metadata.get("lora_adapter_metadata", "{}")
        settings = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise SVFitError(f"the settings of {path} cannot be read ({error}): correct or remove them.") from None
    return settings if isinstance(settings, dict) else {}


def _split(key: str) -> tuple[str, str | None]:
    """The name of the layer in a tensor's name, and which part of it the tensor is; None: none that is known."""
    for pattern, part in PARTS:
        match = pattern.search(key)
        if match:
            return key[: match.start()].replace(".processor.", ".").replace("to_out_lora", "to_out.0_lora"), part
    return key, None


def _spellings(base: BaseModel) -> dict[str, list[tuple[str, slice]]]:
    """Every name that a LoRA may give to a layer of `base` -> the layers "<component>.<path>" and their rows of it."""
    family, everything = base.family, slice(None)
    spelled: dict[str, list[tuple[str, slice]]] = {}
    for component, model in family.components.items():
        for name, (_, _, layer) in matrix_layers(model).items():
            full = f"{component}.{name}"
            short = full.replace("text_model.", "", 1)
            names = [full, short, full.replace(".to_out.0", ".to_out")]
            names += [f"base_model.model.{full}", f"base_model.model.{short}"]
            if component == family.denoiser_name:  # trainers of one network leave its name out
                names += [name, f"base_model.model.{name}"]
            spelled |= {spelling: [(full, everything)] for spelling in names}
            with suppress(SVFitError):  # one that kohya's files have no name for
                (place,) = lora_places([full], "kohya", family).values()
                own = everything if place.rows is None else slice(place.first, place.first + layer.weight.shape[0])
                spelled.setdefault(place.stem, []).append((full, own))
    return spelled


def _change(path: Path, name: str, parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """up (out, rank), with the scale, and down (rank, in) of the layer `name`."""
    if not {"up", "down"} <= set(parts):
        raise SVFitError(f"{path} has one matrix of {name} and lacks the other: download it again.")
    up, down = parts["up"].flatten(1), parts["down"].flatten(1)
    rank = down.shape[0]
    if up.shape[1] != rank or parts["up"].ndim == 4 and parts["up"].shape[2:] != (1, 1):
        raise SVFitError(
            f"{path} has {tuple(parts['up'].shape)} and {tuple(parts['down'].shape)} for {name}, which make no change."
        )
    if "alpha" in parts:
        return up * (parts["alpha"].item() / rank), down
    component, _, layer = name.partition(".")
    own = {key.removeprefix(f"{component}."): value for key, value in settings.items()}
    alpha = _of_layer(own.get("alpha_pattern"), layer, own.get("lora_alpha", rank))
    divisor = rank**0.5 if own.get("use_rslora") else rank
    if not isinstance(alpha, int | float):
        raise SVFitError(f"the settings of {path} give {name} the alpha {alpha!r}, which is no number.")
    return up * (alpha / divisor), down


def _of_layer(pattern: Any, layer: str, otherwise: Any) -> Any:
    """What PEFT's `pattern`, ending of a name -> value, gives to `layer`."""
    for ending, value in pattern.items() if isinstance(pattern, dict) else ():
        if layer == ending or layer.endswith(f".{ending}"):
            return value
    return otherwise


def _weights(base: BaseModel, changes: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The weights (out, in) that are changed; raises SVFitError where a change has another shape."""
    weights = {}
    for component, model in base.family.components.items():
        for name, (_, _, layer) in matrix_layers(model).items():
            full = f"{component}.{canonical_name(model, name)}"
            if full in changes:
                check_plain(full, layer)
                weights[full] = as_matrix(layer.weight.detach())
                up, down = changes[full]
                if (up.shape[0], down.shape[1]) != tuple(weights[full].shape):
                    raise SVFitError(
                        f"the LoRA changes {full} by {up.shape[0]} x {down.shape[1]} values, and the weight has "
                        f"{' x '.join(map(str, weights[full].shape))}: it was made for another base model."
                    )
    return weights


def _project(
    changes: Mapping[str, tuple[Tensor, Tensor]],
    weights: Mapping[str, Tensor],
    basis_cache_dir: str | Path | None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Shifts along the base's directions, and what they miss of each component and, under "", of all."""
    bases = model_basis(weights, cache_dir=basis_cache_dir)
    shifts = {}
    sums: dict[str, list[float]] = {}  # component -> squares of the changes, and of what was taken over
    for name in tqdm(changes, desc="projecting", unit="matrix", leave=False):
        up, down = (factor.double() for factor in changes[name])
        U, Vh = (factor.cpu().double() for factor in bases[name])
        shift = ((U.mT @ up) * (down @ Vh.mT).mT).sum(1)  # (k,), u_i^T D v_i
        energy = ((up.mT @ up) * (down @ down.mT)).sum().item()  # |D|^2
        for component in ("", name.partition(".")[0]):
            total = sums.setdefault(component, [0.0, 0.0])
            total[0], total[1] = total[0] + energy, total[1] + shift.square().sum().item()
        shifts[name] = shift.float()
    return shifts, {
        name: (max(all_ - taken, 0.0) / all_) ** 0.5 if all_ else 0.0 for name, (all_, taken) in sums.items()
    }
