"""Adapters from the spectral shifts that SVDiff trainers write, as far as these fit.

SVDiff (Han et al. 2023, arXiv 2303.11305) computes W' = U diag(relu(S + delta)) Vh for every weight of a model, also
embeddings and norms.  Its public trainers save `spectral_shifts.safetensors` (UNet) and
`spectral_shifts_te.safetensors` (text encoder), one tensor `<module path>.delta` a weight; some of them also the
embeddings of tokens that they added, `modifier_tokens.<token>`.  An adapter has room for linear layers and convolutions only.

The directions are not quite the same either: SVDiff decomposes the weight as stored, an adapter's basis is that of the
canonical weight (see basis.py).  So the change of the weight is computed, D = U diag(relu(S + delta) - S) Vh, and
projected onto the adapter's directions: shift_i = u_i^T D v_i, which is the closest that an adapter can come.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from svfit_dreambooth.adapter.checks import FORMAT, container, other_kind
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint, model_basis
from svfit_dreambooth.method.decomposition import as_matrix, decompose
from svfit_dreambooth.method.targets import canonical_name, check_plain, matrix_layers
from svfit_dreambooth.sharing.imports import Import, kinds

SUFFIX = ".delta"
ADDED_TOKEN = "modifier_tokens."
FILES = {"unet": "spectral_shifts.safetensors", "text_encoder": "spectral_shifts_te.safetensors"}


def import_svdiff(
    path: str | Path, base: BaseModel, *, partial: bool = False, basis_cache_dir: str | Path | None = None
) -> Import:
    """The adapter for `base` that comes closest to the SVDiff file, or folder of such files, at `path`.

    A folder may hold both files of `FILES`; a single file is the UNet's, unless all its layers are the text encoder's.
    `partial`: take over what fits and leave the rest; otherwise a file with tensors that do not fit is refused,
    since its pictures would change.  Tensors that are all zero change nothing and never count.
    Raises SVFitError for a file of another kind, or of a model with other layers.
    """
    shifts: dict[str, Tensor] = {}
    unfit: dict[str, str] = {}
    left_out = 0.0  # square of the change of the weights that have no place
    weights: dict[str, Tensor] = {}
    components = base.family.components
    for file in _files(Path(path)):
        deltas = _read(file)
        component = _component(file, deltas, components)
        layers = {name: layer for name, (_, _, layer) in matrix_layers(components[component]).items()}
        others = {canonical_name(components[component], name) for name, _ in components[component].named_modules()}
        for name, delta in deltas.items():
            if name.startswith(ADDED_TOKEN):
                unfit[f"{component}.{name}"] = "added token"
                continue
            if not delta.any():
                continue
            if name in layers and delta.shape == (min(as_matrix(layers[name].weight).shape),):
                check_plain(f"{component}.{name}", layers[name])
                shifts[f"{component}.{name}"] = delta
                weights[f"{component}.{name}"] = as_matrix(layers[name].weight.detach())
            elif name in layers:
                shape = tuple(as_matrix(layers[name].weight).shape)
                raise SVFitError(
                    f"{file} holds {len(delta)} values for {component}.{name}, whose weight {shape} has "
                    f"{min(shape)} here: it was made for another base model."
                )
            elif name in others:
                left_out += delta.double().square().sum().item()
                unfit[f"{component}.{name}"] = type(
                    components[component].get_submodule(_real(components, component, name))
                ).__name__
            else:
                raise SVFitError(f"{file} changes {name}, which the {component} of {base.name} lacks: name its base.")
    total = left_out + sum(delta.double().square().sum().item() for delta in shifts.values())
    share = (left_out / total) ** 0.5 if total else 0.0
    if unfit and not partial:
        raise SVFitError(
            f"{len(unfit)} of {len(unfit) + len(shifts)} tensors in {path} do not fit an adapter ({kinds(unfit)}), "
            f"{share:.1%} of the whole change, and without them its pictures would differ: add partial to take over the "
            "other layers alone.",
            "partial",
        )
    if not shifts:
        raise SVFitError(f"nothing in {path} fits an adapter: it changes no linear layer and no convolution.")
    projected, lost = _project(shifts, weights, basis_cache_dir)
    adapter = Adapter(
        shifts=projected,
        base_model=base.name,
        base_fingerprint=fingerprint(weights),
        training={"imported_from": "SVDiff", "left_out": len(unfit), "lost": round(lost, 5)},
        architecture=base.architecture,
    )
    return Import(adapter, unfit, lost, left_out=share)


def _real(components: Mapping[str, torch.nn.Module], component: str, name: str) -> str:
    """The path of the module that `name` stands for in this version of the library."""
    model = components[component]
    return next(path for path, _ in model.named_modules() if canonical_name(model, path) == name)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = [path / name for name in FILES.values() if (path / name).is_file()]
    if not files:
        raise SVFitError(f"{path} holds none of {', '.join(FILES.values())}: name the file itself.")
    return files


def _read(path: Path) -> dict[str, Tensor]:
    """Module path -> delta (k,), float32, checked."""
    with container(path) as file:
        keys, metadata = list(file.keys()), file.metadata() or {}
        kind = other_kind(file)
        known = [key for key in keys if key.endswith(SUFFIX) or key.startswith(ADDED_TOKEN)]
        deltas = {key.removesuffix(SUFFIX): file.get_tensor(key).float() for key in known}
    if not keys or len(deltas) < len(keys):
        what = "" if kind in (None, "SVDiff") else f"a {kind}, "
        what = "an SVFit adapter already, " if metadata.get("format") == FORMAT else what
        raise SVFitError(f"{path} is {what}no SVDiff file: the names of its tensors do not end in {SUFFIX!r}.")
    for name, delta in deltas.items():
        if (delta.ndim != 1 and not name.startswith(ADDED_TOKEN)) or not torch.isfinite(delta).all():
            raise SVFitError(f"{name}{SUFFIX} in {path} is no vector of finite numbers: the file cannot be used.")
    return deltas


def _component(file: Path, deltas: Mapping[str, Tensor], components: Mapping[str, torch.nn.Module]) -> str:
    text = all(name.startswith(("text_model.", ADDED_TOKEN)) for name in deltas)
    component = "text_encoder" if text or file.name == FILES["text_encoder"] else "unet"
    if component not in components:
        raise SVFitError(f"{file} changes the {component}, which this base lacks.")
    return component


def _project(
    deltas: Mapping[str, Tensor], weights: Mapping[str, Tensor], basis_cache_dir: str | Path | None
) -> tuple[dict[str, Tensor], float]:
    """Shifts along the adapter's directions, and the relative part of all changes together that they miss."""
    bases = model_basis(weights, cache_dir=basis_cache_dir)
    shifts = {}
    missed = total = 0.0
    for name in tqdm(deltas, desc="projecting", unit="matrix", leave=False):
        U, S, Vh = decompose(weights[name])  # (out, k), (k,), (k, in), of the weight as stored
        moved = (S + deltas[name].to(S)).clamp(min=0) - S  # (k,)
        change = (U * moved) @ Vh  # (out, in)
        basis_U, basis_Vh = (factor.to(change) for factor in bases[name])
        shift = ((basis_U.mT @ change) * basis_Vh).sum(1)  # (k,), u_i^T D v_i
        energy, taken = moved.square().sum().item(), shift.square().sum().item()
        missed, total = missed + max(energy - taken, 0.0), total + energy
        shifts[name] = shift.float().cpu()
    return shifts, (missed / total) ** 0.5 if total else 0.0
