"""What every holder of shifts computes with them, be it a layer, PEFT, an export or another program's node.

With the symbols of `layer.py`, D = U diag(shift) Vh is what an adapter adds to a weight W.  Adapters of one base lie
along the same directions, so several at once are the sum of their shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def shift_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """The type of a shift beside weights of `weight_dtype`: at least float32, near 1 bfloat16 cannot hold a step."""
    return torch.promote_types(weight_dtype, torch.float32) if weight_dtype.is_floating_point else torch.float32


def delta(U: Tensor, shift: Tensor, Vh: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """U diag(shift) Vh, (out, in), from U (out, r), shift (r,), Vh (r, in), computed in `dtype`; None: the type of U."""
    dtype = dtype or U.dtype
    return (U.to(dtype) * shift.to(dtype)) @ Vh.to(dtype)


def exact_delta(U: Tensor, shift: Tensor, Vh: Tensor) -> Tensor:
    """`delta` in the wider type of U and shift, at least float32."""
    return delta(U, shift, Vh, shift_dtype(torch.promote_types(U.dtype, shift.dtype)))


def merged_weight(weight: Tensor, change: Tensor) -> Tensor:
    """W + D, shaped and typed as `weight`, rounded once: `change` (out, in) is an `exact_delta`."""
    exact = torch.promote_types(weight.dtype, change.dtype)
    return (weight.to(exact) + change.to(exact).view(weight.shape)).to(weight.dtype)


def padded(shift: Tensor, rank: int) -> Tensor:
    """`shift` (..., r) with zeros up to (..., rank), a copy only where it is shorter."""
    missing = rank - shift.shape[-1]
    return nn.functional.pad(shift, (0, missing)) if missing else shift


def sum_of_shifts(weighted: Sequence[tuple[Tensor, float]]) -> Tensor:
    """sum_i scale_i * shift_i of one layer, (shift (r_i,), scale_i) each, the shorter ones padded with zeros."""
    longest = max(len(shift) for shift, _ in weighted)
    (first, scale), *others = weighted
    total = padded(first if scale == 1.0 else first * scale, longest)
    for shift, scale in others:
        total = torch.add(total, padded(shift, longest), alpha=scale)
    return total


def add_shifts(weighted: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """`sum_of_shifts` of every layer of several sets of shifts of one base; layers that a set lacks count as zero."""
    names = dict.fromkeys(name for shifts, _ in weighted for name in shifts)
    return {
        name: sum_of_shifts([(shifts[name], scale) for shifts, scale in weighted if name in shifts]) for name in names
    }


@contextmanager
def kept_precise(tensors: Callable[[], Mapping[str, Tensor]], dtype: Callable[[], torch.dtype]) -> Iterator[None]:
    """Within it a module may be cast (`nn.Module._apply`); `tensors()` of it come out in `dtype()`, not narrower.

    `Module.half()` and `Module.to(dtype)` pass every parameter through a function.  In float16 a shift would have lost
    its small digits already, so value and gradient are rebuilt from what they were before, on the device of today.
    """
    before = {name: (p.data, None if p.grad is None else p.grad.data) for name, p in tensors().items()}
    yield
    for name, parameter in tensors().items():
        if parameter.dtype != dtype():
            value, gradient = before[name]
            # out of the meta device there is nothing to rebuild from
            parameter.data = (parameter.data if value.is_meta else value).to(parameter.device, dtype())
            if gradient is not None:
                parameter.grad = gradient.to(parameter.device, dtype())
