"""Weights of their own for the samples of a batch, W_i = W + U diag(shift_i) Vh, kept from one call to the next.

Painting calls every layer once a step, and its shifts stay what they are: where memory allows, the merged weights are
computed in the first step and kept, and a batch of many adapters costs what a batch of one does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import delta


@dataclass
class Room:
    """Bytes that merged weights of all layers together may still take."""

    left: int

    def take(self, size: int) -> bool:
        """Whether there was room for `size` bytes, which are taken then."""
        if size > self.left:
            return False
        self.left -= size
        return True


@dataclass
class Mixed:
    """The shifts of one layer for the mixes of a batch, whose samples come `passes` times mix by mix, `copies` each."""

    shifts: Tensor  # (mixes, 1, r)
    copies: int
    passes: int
    room: Room
    kept: Tensor | None = None  # (mixes, in, out)

    @property
    def samples(self) -> int:
        """The size of the batch."""
        return self.passes * len(self.shifts) * self.copies

    def weights(self, weight: Tensor, U: Tensor, Vh: Tensor, cheap: bool) -> Tensor | None:
        """W_i^T of every mix, (mixes, in, out), of `weight` (out, in); kept where there is room.

        Transposed, which batched products like better.  `cheap`: whether they are worth computing for this call alone;
        None where they are not, and there is no room.
        """
        if self.kept is None or self.kept.device != weight.device or self.kept.dtype != weight.dtype:
            size = len(self.shifts) * weight.numel() * weight.element_size()
            keep = self.kept is not None or self.room.take(size)
            if not (keep or cheap):
                return None
            rows = Vh.mT.contiguous()  # its product with shifts is one large matrix then
            made = delta(rows, self.shifts.to(weight.device), U.mT).to(weight.dtype)  # (mixes, in, out)
            made += weight.mT
            if not keep:
                return made
            self.kept = made
        return self.kept

    def linear(self, input: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
        """(samples, ..., in) -> (samples, ..., out): x_i W_i^T + b."""
        if len(input) != self.samples:
            raise SVFitError(f"the shifts of {self.samples} samples meet a batch of {len(input)}.")
        mixes, in_features, out_features = weights.shape
        grouped = input.reshape(self.passes, mixes, -1, in_features)  # (passes, mixes, copies * tokens, in)
        if torch.is_grad_enabled():
            output = torch.stack([torch.bmm(each, weights) for each in grouped])
        else:  # spares the copy
            output = grouped.new_empty(*grouped.shape[:-1], out_features)
            for each, result in zip(grouped, output, strict=True):
                torch.bmm(each, weights, out=result)
        if bias is not None:
            output += bias
        return output.view(*input.shape[:-1], out_features)
