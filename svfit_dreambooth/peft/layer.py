"""One linear layer under PEFT, with the numbers of `SVFitLinear`.

PEFT wants its own shape of a layer: the base's layer inside as `base_layer`, and the trained parameters of several
adapters in dictionaries by name.  All adapters of a layer lie along the same directions, so the active ones are
added up first and the layer computes once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import (
    delta,
    exact_delta,
    kept_precise,
    merged_weight,
    shift_dtype,
    sum_of_shifts,
)
from svfit_dreambooth.method.basis import canonical_weight, warn_of_ambiguity
from svfit_dreambooth.method.decomposition import decompose
from svfit_dreambooth.method.layer import merged_is_cheaper


class SVFitPeftLinear(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """y = x (W + U diag(sum_i scale_i * shift_i) Vh)^T + b over the active adapters i.

    All adapters of a layer lie along the same directions, so they share U (out, r) and Vh (r, in), r the largest of
    their ranks, and several at once cost no more than one.  U and Vh are no part of any state dict.
    PEFT's "all-linear" recognises adapted layers by the word Linear in the name of their class.
    """

    adapter_layer_names = ("svfit_shift",)
    other_param_names = ("svfit_scale",)
    U: Tensor
    Vh: Tensor
    base_layer: Any  # an nn.Linear or a Conv1D
    active_adapters: Any  # PEFT's, a list of names

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        _check_target(name, base_layer)
        self.base_layer = base_layer
        self.name = name
        self.kept_weight: Tensor | None = None  # the base's own, while adapters are merged
        self.out_features, self.in_features = self.base_matrix().shape
        self.svfit_shift = nn.ParameterDict()  # adapter name -> (r,)
        self.svfit_scale: dict[str, float] = {}
        self.register_buffer("U", None, persistent=False)
        self.register_buffer("Vh", None, persistent=False)
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    def base_matrix(self) -> Tensor:
        """The base's own weight as (out, in), merged or not; GPT-2's Conv1D keeps its weight as (in, out)."""
        weight = self.base_layer.weight.detach() if self.kept_weight is None else self.kept_weight
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def update_layer(self, adapter_name: str, rank: int | str, energy: float | None, inference_mode: bool) -> int:
        """Adds the adapter `adapter_name` with its shift at zero; returns its rank."""
        W = self.base_matrix()
        if W.is_meta:
            raise SVFitError(f"{self.name} has no weights yet (device meta), so it has no singular values: load first.")
        wanted = min(rank, *W.shape) if isinstance(rank, int) else min(W.shape)
        if self.U is None or energy is not None or self.U.shape[1] < wanted:
            U, S, Vh = decompose(canonical_weight(W), "full" if energy is not None else wanted, energy=energy)
            warn_of_ambiguity(self.name, S, tuple(W.shape))
            wanted = len(S)
            if self.U is None or self.U.shape[1] < wanted:
                self.U, self.Vh = U.to(W.device, W.dtype), Vh.to(W.device, W.dtype)
        shift = torch.zeros(wanted, device=W.device, dtype=shift_dtype(W.dtype))
        self.svfit_shift[adapter_name] = nn.Parameter(shift)
        self.svfit_scale[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)  # type: ignore[operator]
        return wanted

    def total_shift(self, adapter_names: list[str]) -> Tensor | None:
        """sum_i scale_i * shift_i, (r,), the shorter ones padded with zeros; None if the layer has none of them."""
        present = [name for name in adapter_names if name in self.svfit_shift]
        return (
            sum_of_shifts([(self.svfit_shift[name], self.svfit_scale[name]) for name in present]) if present else None
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)"""
        if self.disable_adapters and self.merged:
            self.unmerge()
        shift = None if self.disable_adapters or self.merged else self.total_shift(self.active_adapters)
        if shift is None:
            return self.base_layer(x, *args, **kwargs)
        rank = len(shift)
        U, Vh = self.U[:, :rank], self.Vh[:rank]
        tokens = x.numel() // self.in_features
        training = torch.is_grad_enabled() and shift.requires_grad
        if not _is_hooked(self.base_layer) and merged_is_cheaper(
            tokens, self.in_features, self.out_features, rank, training
        ):
            W = self.base_matrix()
            return F.linear(x, W + delta(U, shift, Vh).to(W.dtype), self.base_layer.bias)
        coefficients = F.linear(x, Vh) * shift  # (..., r)
        return self.base_layer(x, *args, **kwargs) + F.linear(coefficients.to(x.dtype), U)

    def delta(self, adapter_names: list[str]) -> Tensor | None:
        """U diag(total shift) Vh, (out, in), in at least float32; None where the layer has none of the adapters."""
        shift = self.total_shift(adapter_names)
        if shift is None:
            return None
        return exact_delta(self.U[:, : len(shift)], shift, self.Vh[: len(shift)])

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What one adapter adds to the base's weight, in that weight's own orientation."""
        change = self.delta([adapter_name])
        if change is None:
            raise SVFitError(f"{self.name} has no adapter named {adapter_name!r}.")
        return change.T if isinstance(self.base_layer, Conv1D) else change

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes W + delta into the base layer; W itself is kept, as (W + D) - D is not W."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.svfit_shift]
        change = self.delta(self.merged_adapters + names)
        if not names or change is None:
            return
        merged = merged_weight(self.base_matrix(), change)
        if safe_merge and not torch.isfinite(merged).all():
            raise SVFitError(
                f"merging {', '.join(names)} into {self.name} gives NaN or infinity: the adapter is broken."
            )
        if self.kept_weight is None:
            self.kept_weight = self.base_layer.weight.data
        self.base_layer.weight.data = merged.T.contiguous() if isinstance(self.base_layer, Conv1D) else merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Puts the kept weight back, to the bit."""
        if self.kept_weight is not None:
            self.base_layer.weight.data = self.kept_weight
            self.kept_weight = None
        self.merged_adapters.clear()

    # diffusers sets strengths by these three: `set_adapters(names, weights)`, `cross_attention_kwargs`

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """The strength of one adapter, 1 as trained."""
        if adapter_name in self.svfit_scale:
            self.svfit_scale[adapter_name] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the strengths of the active adapters."""
        for name in self.active_adapters:
            self.set_scale(name, self.svfit_scale.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides them again; None: back to 1."""
        for name in self.active_adapters:
            self.set_scale(name, 1.0 if scale is None else self.svfit_scale.get(name, 1.0) / scale)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        shift, weight = self.svfit_shift[adapter_name], self.base_layer.weight
        if not shift.is_meta:
            shift.data = shift.data.to(device or weight.device, shift_dtype(weight.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SVFitPeftLinear:
        with kept_precise(lambda: dict(self.svfit_shift), lambda: shift_dtype(self.base_layer.weight.dtype)):
            super()._apply(fn, recurse)
        if self.kept_weight is not None:
            self.kept_weight = fn(self.kept_weight)
        return self


def _check_target(name: str, layer: Any) -> None:
    computes_plainly = isinstance(layer, Conv1D) or (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )
    if not computes_plainly or not layer.weight.is_floating_point():
        reason = "holds whole numbers" if computes_plainly else f"is a {type(layer).__name__}"
        raise SVFitError(
            f"{name} {reason}, and SVFit adapts plain, unquantised linear layers: name others in target_modules, or "
            "leave it out with exclude_modules."
        )


def _is_hooked(layer: nn.Module) -> bool:
    """Offloading and other hooks act on a layer's forward, which must then be called."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks) or hasattr(layer, "_hf_hook")
