"""What a LoRA made of an adapter will hold, weigh and lose, known before it is computed.

An adapter changes a layer by D = U diag(shift) Vh.  U and Vh are orthonormal, so |shift| are the singular values of
D: the best LoRA of rank N keeps the N largest of them, and the relative error of what it drops is exactly
sqrt(sum of dropped shift^2 / sum of all shift^2)  (Eckart and Young, in the Frobenius norm).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import size_text
from svfit_dreambooth.sharing.lora_names import Layout

OUTSIDE_OF_BLOCKS = re.compile(
    r"unet\.(conv_in|conv_out|time_embedding|add_embedding)\b"
)  # not in sd-scripts' networks
BYTES = {torch.float16: 2, torch.float32: 4}


@dataclass
class LoraPlan:
    """Which directions of which layers a LoRA keeps."""

    layout: Layout
    dtype: torch.dtype
    kept: dict[str, Tensor]  # layer -> numbers of the directions kept, strongest first, (rank,)
    shapes: dict[str, tuple[int, int]]  # layer -> (out, in)
    errors: dict[str, float]  # layer -> relative error of its change, 0 where nothing is dropped
    total_error: float  # relative error of the change of all layers together
    full_bytes: int  # weights of the exact LoRA
    rows: Mapping[str, int]  # of the file's layer, where several of ours are one in it

    @property
    def ranks(self) -> dict[str, int]:
        """Layer -> rank."""
        return {name: len(kept) for name, kept in self.kept.items()}

    @property
    def bytes(self) -> int:
        """Size of the weights; the file's header adds some ten kilobytes."""
        sizes = (
            len(kept) * (self.rows.get(name, self.shapes[name][0]) + self.shapes[name][1])
            for name, kept in self.kept.items()
        )
        return sum(sizes) * BYTES[self.dtype]

    def lines(self) -> list[str]:
        """The plan in plain words, the size first."""
        ranks = sorted(self.ranks.values())
        spread = f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        size = f"{size_text(self.bytes)} as a {self.layout} LoRA in {str(self.dtype)[6:]}"
        lines = [f"{size}: {len(self.kept)} layers of rank {spread}"]
        if self.total_error > 0:
            worst = max(self.errors, key=lambda name: self.errors[name])
            lines.append(
                f"it leaves out {self.total_error:.2%} of the adapter's change, at most {self.errors[worst]:.2%} of a "
                f"layer's ({worst}); the exact LoRA would weigh {size_text(self.full_bytes)}"
            )
        else:
            lines.append("it holds the adapter's whole change")
        return lines + self._readers()

    def _readers(self) -> list[str]:
        """Which programs read less of the file than it holds."""
        encoders = [name for name in self.kept if name.startswith("text_encoder")]
        if self.layout == "diffusers":
            text = (
                "ComfyUI reads the UNet's part of this layout only, without the text encoder's: kohya's is whole there"
            )
            return [text] if encoders else []
        outside = sorted(name for name in self.kept if OUTSIDE_OF_BLOCKS.match(name))
        text = (
            f"sd-scripts has no place for {len(outside)} of the layers, such as {outside[0]}, and leaves them out"
            if outside
            else ""
        )
        return [text] if outside else []


def plan_lora(
    shifts: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    layout: Layout = "kohya",
    *,
    rank: int | None = None,
    error: float | None = None,
    dtype: torch.dtype = torch.float16,
    rows: Mapping[str, int] | None = None,
) -> LoraPlan:
    """Chooses what to keep of `shifts`, layer -> (r,), of weights of `shapes`, layer -> (out, in).

    `rank`: at most so many directions a layer, the strongest; None: all.  `error`, in its place: as few as leave no
    layer's change off by more than this share (0.01: one per cent).  `rows`: see `LoraPlan`.  Directions with a shift of zero, and layers with
    no other, are never stored.  Raises SVFitError for values that make no sense and for shifts that are all zero.
    """
    if rank is not None and error is not None:
        raise SVFitError("rank and error both choose what a LoRA keeps: give one of them.", "rank", "error")
    if rank is not None and rank < 1:
        raise SVFitError(f"rank {rank} keeps nothing: give a number of 1 or more.", "rank")
    if error is not None and not 0 <= error < 1:
        raise SVFitError(
            f"error {error:g} is no share of the change: give a number from 0 to below 1, such as 0.01.", "error"
        )
    if dtype not in BYTES:
        raise SVFitError(f"a LoRA is saved as torch.float16 or torch.float32, not as {dtype}.")
    kept, errors = {}, {}
    dropped_energy = total_energy = 0.0
    full_values = 0
    for name, shift in shifts.items():
        energies, order = shift.detach().cpu().double().square().sort(descending=True)  # (r,), (r,)
        nonzero = int((energies > 0).sum())
        if nonzero == 0:
            continue
        left = energies.sum() - energies.cumsum(0)  # (r,), what dropping all after each would lose
        if error is not None:
            enough = left <= error**2 * energies.sum()  # (r,)
            count = min(int((~enough).sum()) + 1, nonzero)
        else:
            count = min(rank or nonzero, nonzero)
        lost = float(energies[count:].sum())
        kept[name] = order[:count]
        errors[name] = (lost / float(energies.sum())) ** 0.5
        dropped_energy, total_energy = dropped_energy + lost, total_energy + float(energies.sum())
        full_values += nonzero * ((rows or {}).get(name, shapes[name][0]) + shapes[name][1])
    if not kept:
        raise SVFitError("every shift of the adapter is zero, it changes nothing: there is nothing to export.")
    return LoraPlan(
        layout=layout,
        dtype=dtype,
        kept=kept,
        shapes={name: (shapes[name][0], shapes[name][1]) for name in kept},
        errors=errors,
        total_error=(dropped_energy / total_energy) ** 0.5,
        full_bytes=full_values * BYTES[dtype],
        rows=dict(rows or {}),
    )
