"""Singular values put into a base to be differentiated by, and taken out again: before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.method.basis import model_triplets
from svfit_dreambooth.method.decomposition import Rank
from svfit_dreambooth.method.targets import apply_svfit, remove_svfit
from svfit_dreambooth.training.slim import spare_memory, spend_memory


@contextmanager
def probed(
    family: Family,
    targets: Mapping[str, Sequence[str]],
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str] | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    checkpointing: bool = False,
    rank: Rank = "full",
    energy: float | None = None,
    cache_dir: str | Path | None = None,
) -> Iterator[dict[str, nn.Parameter]]:
    """Within it the shifts of all `targets`, "<component>.<layer>" -> (r,), are zero and wait for gradients.

    `targets`: component -> layers.  `weights`, `hashes`: of the layers as they are stored, by the names of the shifts.
    `rank`, `energy`: see `layer.resolve_rank`.  The adapted networks come to `device` in `dtype`, and stay there,
    unpatched and frozen.
    """
    bases = model_triplets(weights, rank, energy=energy, cache_dir=cache_dir, hashes=hashes)
    shifts: dict[str, nn.Parameter] = {}
    try:
        for component, names in targets.items():
            network = family.components[component]
            own = apply_svfit(
                network, target_modules=names, basis={name: bases[f"{component}.{name}"] for name in names}
            )
            shifts |= {f"{component}.{name}": shift for name, shift in own.items()}
            network.to(device, dtype).train()
            spare_memory(network, checkpointing)
        yield shifts
    finally:
        for component in targets:
            remove_svfit(family.components[component])
            spend_memory(family.components[component])


def gradient(shift: nn.Parameter) -> Tensor:
    """What the backward passes since `shift.grad` was last cleared added up; zeros for a layer that none went through.

    Such as the last one of a text encoder whose last but one answer is read.
    """
    return torch.zeros_like(shift) if shift.grad is None else shift.grad
