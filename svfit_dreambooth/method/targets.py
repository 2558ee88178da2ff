"""Which layers of a model SVFit adapts, and putting its layers in and taking them out.

An attention processor computes with the projections of its attention module.  Replacing those projections patches
every processor that may be installed, now or later, and leaves the rest of the model alone.  They are the default;
the feed-forward layers beside them, the convolutions, or everything may be adapted too.  What a kind of model calls
them is for the caller to say, as `LayerNames`.

Names are those that published checkpoints use ("canonical"): without the wrappers that PEFT and torch.compile
put around layers and modules, and with the `text_model.` level that some transformers versions have dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import padded
from svfit_dreambooth.method.decomposition import Rank, as_matrix, decompose
from svfit_dreambooth.method.layer import SVFitConv2d, SVFitLayer, SVFitLinear
from svfit_dreambooth.method.one_sided import SVFitOneSided, svfit_layer
from svfit_dreambooth.method.quantized import KINDS, check_stored, is_quantized, kind_of, stored_weight

Layer = nn.Linear | nn.Conv2d
Projections = dict[str, tuple[nn.Module, str, Layer]]  # canonical name -> (parent module, attribute, layer)
PLAIN_LAYERS = (
    nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Conv2d, SVFitLinear, SVFitOneSided, SVFitConv2d,
)  # fmt: skip


@dataclass(frozen=True)
class LayerNames:
    """What a kind of model calls its layers."""

    attention: tuple[tuple[str, ...], ...] = ()  # each: the projections that one attention module has all of
    feed_forward: tuple[str, ...] = ()  # endings of names


def canonical_name(model: nn.Module, path: str) -> str:
    """The name that published checkpoints give to the layer, or the norm or embedding, at `path` of `model`."""
    parts = [part for part in path.split(".") if part not in ("base_layer", "_orig_mod", "module")]
    name = ".".join(parts)
    if name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) and type(
        _unwrapped(model)
    ).__name__.startswith("CLIPText"):
        name = "text_model." + name
    return name


def matrix_layers(model: nn.Module) -> Projections:
    """Every linear layer and 2-D convolution of `model`.

    The layers of PEFT's own adapters are neighbours and not among them.  Raises SVFitError where attention
    projections are fused into copies of the weights, on which a patch would have no effect.
    """
    processors = getattr(model, "attn_processors", {})
    fused = any(type(processor).__name__.startswith("Fused") for processor in processors.values())
    # attention that can be unfused says whether it is; the older kind goes by its processors and keeps the mark
    marked = (vars(module) for _, module in walk(model) if hasattr(module, "unfuse_projections"))
    if fused or any(own.get("fused_projections") is True for own in marked):
        raise SVFitError(
            "the query, key and value projections of this model are fused into copies of the weights, which SVFit "
            "layers would not reach: call unfuse_qkv_projections() first."
        )
    layers = {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, nn.Linear | nn.Conv2d) and ".lora_" not in path:
            parent_path, _, attribute = path.rpartition(".")
            layers[canonical_name(model, path)] = (model.get_submodule(parent_path), attribute, layer)
    return layers


def check_plain(name: str, layer: Layer) -> None:
    """Raises SVFitError for a layer whose weight cannot be decomposed: quantised, unless it tells what it was before."""
    if kind_of(layer) in KINDS.values():
        check_stored(name, layer)
        return
    if type(layer) not in PLAIN_LAYERS:
        kind = "convolution" if isinstance(layer, nn.Conv2d) else "linear layer"
        raise SVFitError(f"{name} is a {type(layer).__name__}, not a plain {kind}: load the base unquantised.")
    if is_quantized(layer):
        raise SVFitError(f"{name} holds {layer.weight.dtype} values: load the base in float32, float16 or bfloat16.")


def find_projections(
    model: nn.Module, target_modules: Sequence[str] | None = None, names: LayerNames = LayerNames()
) -> Projections:
    """The layers of `model` to adapt, as `matrix_layers` gives them.

    `target_modules`: any of
        "attention"      every attention projection, as `names` calls them
        "feed-forward"   the linear layers behind each attention, as `names` calls them
        "conv"           every convolution
        "all-linear"     every linear layer
        "all"            every linear layer and convolution
    and names or name endings such as "to_q" or "attn2.to_k".  None means "attention" where the model has any, else
    "all-linear".
    Raises SVFitError for a target that matches nothing, and as `matrix_layers` and `check_plain` do.
    """
    layers = matrix_layers(model)
    linears = {name for name, (_, _, layer) in layers.items() if isinstance(layer, nn.Linear)}
    attention = _attention_names(model, layers, names.attention)
    words = {
        "attention": attention,
        "feed-forward": _ending(linears, *names.feed_forward),
        "conv": set(layers) - linears,
        "all-linear": linears,
        "all": set(layers),
    }
    if target_modules is None:
        chosen = attention or linears
    else:
        if isinstance(target_modules, str):
            target_modules = [target_modules]
        chosen = set()
        for target in target_modules:
            matched = words.get(target) or _ending(layers, target)
            if not matched:
                raise SVFitError(
                    f"target module {target!r} matches no linear layer or convolution of "
                    f"{type(_unwrapped(model)).__name__}: use {', '.join(words)}, or endings such as "
                    f"{', '.join(repr(t) for t in _known_endings(layers))}."
                )
            chosen |= matched
    if not chosen:
        raise SVFitError(f"{type(_unwrapped(model)).__name__} has no linear layer to adapt.")
    found = {name: layers[name] for name in layers if name in chosen}
    for name, (_, _, layer) in found.items():
        check_plain(name, layer)
    return found


def apply_svfit(
    model: nn.Module,
    rank: Rank = "full",
    target_modules: Sequence[str] | None = None,
    *,
    names: LayerNames = LayerNames(),
    energy: float | None = None,
    basis: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, nn.Parameter]:
    """Freezes `model` and replaces its targeted layers by SVFit layers; returns the trainable shifts by name.

    `rank`, `energy`: how many singular values to train in each layer, see `layer.resolve_rank`.
    `target_modules`, `names`: see `find_projections`.  `basis`: name -> U (out, r), S (r,), Vh (r, in) of every targeted
    layer, or without S, in place of the decomposition here and with it of `rank` and `energy`; `basis.model_triplets`
    makes one.
    The model computes what it computed before, to the bit, until a shift changes.
    """
    found = find_projections(model, target_modules, names)
    if any(isinstance(layer, SVFitLayer) for _, _, layer in found.values()):
        raise SVFitError(f"{type(_unwrapped(model)).__name__} has SVFit layers already: call remove_svfit first.")

    if basis is None:
        bases: dict[str, Sequence[Tensor]] = {
            name: decompose(as_matrix(stored_weight(name, layer)), rank, energy=energy)
            for name, (_, _, layer) in found.items()
        }
    else:
        missing = sorted(set(found) - set(basis))
        if missing:
            raise SVFitError(f"the given basis lacks {len(missing)} of the targeted layers, such as {missing[0]}.")
        bases = {name: basis[name] for name in found}
    model.requires_grad_(False)
    return {name: layer.shift for name, layer in patch_layers(model, bases).items()}


def patch_layers(model: nn.Module, bases: Mapping[str, Sequence[Tensor]]) -> dict[str, SVFitLayer]:
    """Puts an SVFit layer (see `svfit_layer`) in place of every layer that `bases` names canonically.

    A layer that was patched before is patched anew, with its shift at zero.
    """
    found = matrix_layers(model)
    patched: dict[str, SVFitLayer] = {}
    for name, basis in bases.items():
        parent, attribute, layer = found[name]
        plain: Any = layer.to_plain() if isinstance(layer, SVFitLayer) else layer
        patched[name] = svfit_layer(plain, basis)
        _replace(parent, attribute, patched[name])
    for module in model.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections = _fusing_forbidden  # type: ignore[assignment]
    return patched


def remove_svfit(model: nn.Module) -> None:
    """Puts the plain layers back: the base again, to the bit."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, SVFitLayer):
            parent_path, _, attribute = path.rpartition(".")
            _replace(model.get_submodule(parent_path), attribute, layer.to_plain())
    for module in model.modules():
        if vars(module).get("fuse_projections") is _fusing_forbidden:
            del module.fuse_projections


def svfit_layers(model: nn.Module) -> dict[str, SVFitLayer]:
    """The SVFit layers of `model` by canonical name."""
    return {canonical_name(model, path): layer for path, layer in walk(model) if isinstance(layer, SVFitLayer)}


def get_shifts(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every shift (r,) of `model`, on the CPU, by canonical name."""
    return {name: layer.shift.detach().cpu().clone() for name, layer in svfit_layers(model).items()}


@torch.no_grad()
def set_shifts(model: nn.Module, shifts: Mapping[str, Tensor]) -> None:
    """Sets the shifts of `model`: name -> (r,), or (batch, 1, r) for one per sample.

    A layer that `shifts` does not name gets zeros, and a shorter vector is padded with zeros: both mean
    "unchanged".  Merged layers stay merged, with the new shift.  Raises SVFitError for an unknown name or a
    vector longer than the layer's rank.
    """
    layers = svfit_layers(model)
    for name, shift in shifts.items():
        if name not in layers:
            raise SVFitError(f"{type(_unwrapped(model)).__name__} has no SVFit layer named {name!r}.")
        if shift.shape[-1] > layers[name].rank:
            raise SVFitError(f"{name} holds {layers[name].rank} singular values, but the shift has {shift.shape[-1]}.")
    for name, layer in layers.items():
        layer.mixed = None
        own, given = layer.shift, shifts.get(name)
        rank = own.shape[-1]
        shift = own.new_zeros(rank) if given is None else padded(given, rank)  # (r,) or (batch, 1, r)
        merged = layer.unmerged_weight is not None
        if merged:
            if own.shape == shift.shape and torch.equal(own, shift.to(own)):
                continue
            layer.unmerge()
        if own.shape == shift.shape:
            own.copy_(shift)
        else:
            own.data = shift.to(own, copy=True)
        if merged:
            layer.merge()


def merge_shifts(model: nn.Module) -> None:
    """Writes every shift of `model` into its weight: no cost at inference, and a kept copy of the weights."""
    for layer in svfit_layers(model).values():
        layer.merge()


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Within it the shifts of `model` are merged; afterwards every layer is as it was before."""
    before = {name: layer.unmerged_weight is not None for name, layer in svfit_layers(model).items()}
    try:
        merge_shifts(model)
        yield
    finally:
        for name, layer in svfit_layers(model).items():
            if not before.get(name, False):
                layer.unmerge()


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, in the same order and without its recursion, in about half the time."""
    stack: list[tuple[str, nn.Module]] = [("", model)]
    seen: set[nn.Module] = set()
    while stack:
        path, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        prefix = path + "." if path else ""
        stack += [(prefix + name, child) for name, child in reversed(module._modules.items()) if child is not None]


def _unwrapped(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _ending(names: Iterable[str], *endings: str) -> set[str]:
    """Those of `names` that are, or end in, one of `endings`."""
    return {name for name in names for ending in endings if name == ending or name.endswith("." + ending)}


def _attention_names(model: nn.Module, layers: Mapping[str, object], groups: Sequence[tuple[str, ...]]) -> set[str]:
    names = set()
    for path, module in model.named_modules():
        for projections in groups:
            if all(hasattr(module, projection.partition(".")[0]) for projection in projections):
                prefix = canonical_name(model, f"{path}.x")[:-1]
                names |= {prefix + projection for projection in projections} & set(layers)
    return names


def _known_endings(layers: Mapping[str, object]) -> list[str]:
    endings = [name.rpartition(".")[2] for name in layers]
    endings = [
        ".".join(name.split(".")[-2:]) if ending.isdigit() else ending
        for name, ending in zip(layers, endings, strict=True)
    ]
    return sorted(set(endings))[:12]


def _replace(parent: nn.Module, attribute: str, layer: nn.Module) -> None:
    if attribute.isdigit() and isinstance(parent, (nn.ModuleList, nn.Sequential)):
        parent[int(attribute)] = layer
    else:
        setattr(parent, attribute, layer)


def _fusing_forbidden(*args: object, **kwargs: object) -> None:
    raise SVFitError("SVFit layers cannot be fused, their shifts would be lost: unload the adapters first.")
