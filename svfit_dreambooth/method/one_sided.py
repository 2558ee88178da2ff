"""SVFit on one linear layer by one side of its basis: for layers too large, or too coarsely stored, for both.

`layer.py` adds U diag(shift) Vh, with the symbols explained there.  As u_i = W v_i / S_i, the same change is

    W + U diag(shift) Vh = W (I + V diag(g) V^T),   g = shift / S,   that is   y = layer(x + V (g * V^T x))

with the short side of the basis alone, over any frozen layer, whose weight is never looked at.  Where the weight is
wider than tall (out < in) the short side is U, behind the layer: W' = (I + U diag(g) U^T) W.

This delta passes through the weight as the layer holds it, rounded or quantised: direction i is off by about the
rounding error over S_i.  Values below a floor that follows from the weight's type therefore keep both sides:

    y = layer(x + V_big (g * V_big^T x)) + U_small (shift * V_small^T x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.layer import SVFitConv2d, SVFitLayer, SVFitLinear
from svfit_dreambooth.method.quantized import is_quantized, kind_of, stored_weight

# Numbers in U and Vh of one layer: above it they weigh more than the products that both sides can save, see
# `layer.merged_is_cheaper`.  Every attention projection of Stable Diffusion and SDXL lies below, at full rank.
BOTH_SIDES_MOST = 2**23
# Singular values below this share of their root mean square keep both sides, by how the weight is stored, and how
# many that is.  Over 56 trained layers and random shifts the change is then off by, mean and worst, .7 % and 1 % from
# a float16 weight, .9 % and 1.1 % from int8, 2.3 % and 2.7 % from fp8, about 2 % and 3 % from nf4.
FLOORS = {"float": 0.05, "int8": 0.25, "fp8": 0.5, "nf4": 1.5}
USUAL_SMALL = {"float": 0.04, "int8": 0.17, "fp8": 0.36, "nf4": 0.85}


def svfit_layer(plain: nn.Linear | nn.Conv2d, basis: Sequence[Tensor]) -> SVFitLayer:
    """The SVFit layer in place of `plain`, in the form that suits its shape and the memory of its basis.

    `basis`: U (out, r), S (r,), Vh (r, in), or without S, which keeps both sides whatever the size and the weight.
    """
    U, *S, Vh = basis
    if isinstance(plain, nn.Conv2d):
        return SVFitConv2d(plain, U, Vh)
    if not is_quantized(plain) and (not S or both_sides_suit(U.shape[0], Vh.shape[1], len(Vh))):
        return SVFitLinear(plain, U, Vh)
    return SVFitOneSided(plain, U, S[0] if S else torch.zeros(len(Vh)), Vh)


def both_sides_suit(out_features: int, in_features: int, rank: int) -> bool:
    """Whether a weight (out, in) that is stored as floating-point numbers keeps both sides of its basis."""
    return rank * (out_features + in_features) <= BOTH_SIDES_MOST


def basis_numbers(out_features: int, in_features: int, rank: int, kind: str = "float") -> int:
    """How many numbers the basis of a layer holds in the form that `svfit_layer` gives it, as far as shapes tell."""
    both, short = out_features + in_features, min(out_features, in_features)
    if kind == "float" and both_sides_suit(out_features, in_features, rank):
        return rank * both
    small = round(USUAL_SMALL[kind] * rank)
    return small * both + (rank - small) * short


def small_values(S: Tensor, weight: Tensor, kind: str = "float") -> int:
    """How many of `S` (r,), largest first, lie below the floor for a `weight` (out, in) that is stored as `kind`.

    The floor is a share of the root mean square of all its singular values, ||W||_F / sqrt(min(out, in)), since that
    and not the largest value is what rounding errors are in proportion to.
    """
    if S.is_meta or isinstance(S, FakeTensor):  # shapes alone
        return round(USUAL_SMALL[kind] * len(S))
    mean_square = weight.float().square().mean() * max(weight.shape)  # of min(out, in) singular values
    return int((S.to(weight.device).float() < FLOORS[kind] * mean_square.sqrt()).sum())


class SVFitOneSided(SVFitLayer, nn.Linear):
    """y = x (W + U diag(shift) Vh)^T + b by the short side of the basis; see the module.

    Equal to `SVFitLinear` with U := W V / S for the weight W that the layer holds (V := W^T U / S where out < in), and
    as that to the base, to the bit, as long as the shift is zero.
    """

    side: Tensor  # (big, in), rows v_i, or where out < in (big, out), rows u_i
    S: Tensor  # (big,), at least float32
    stored: Callable[[], Tensor]  # reads the weight as it was before it was quantised
    quantized: nn.Linear | None  # the layer that was here before, where its weight is quantised

    def __init__(self, linear: nn.Linear, U: Tensor, S: Tensor, Vh: Tensor) -> None:
        """Takes over the parameters of `linear` (the same objects) with the basis U (out, r), S (r,), Vh (r, in)."""
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self._take_over(linear, U, Vh)
        # a quantised weight means something only to its own layer, which is asked for its product then
        object.__setattr__(self, "quantized", linear if is_quantized(linear) else None)
        if self.quantized is not None:
            self.stored = vars(linear)["stored"]
        big = len(S) - small_values(S, stored_weight("the layer", linear), kind_of(linear))
        side = Vh if self.out_features >= self.in_features else U.mT
        self._hold(side=side[:big].contiguous(), U=U[:, big:].contiguous(), Vh=Vh[big:].contiguous())
        self.register_buffer("S", S[:big].to(self.shift, copy=True), persistent=False)

    @property
    def in_front(self) -> bool:
        """Whether the short side is V, which changes what goes into the layer."""
        return self.out_features >= self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if self.unmerged_weight is not None:
            return self.frozen(input)
        self._suit(input)
        shift = self.shift_of(input)
        if shift.ndim == 3:  # one per sample: (batch, 1, r) to as many dimensions as the input has
            shift = shift.reshape(-1, *(1 for _ in range(input.ndim - 2)), self.rank)
        big = len(self.S)
        gain = shift[..., :big] / self.S  # (..., big)
        if self.in_front:
            output = self.frozen(self._moved(input, input, gain))
        else:
            output = self.frozen(input)
            output = self._moved(output, output if self.bias is None else output - self.bias, gain)
        if big < self.rank:
            coefficients = F.linear(input, self.Vh) * shift[..., big:]  # (..., small)
            output = output + F.linear(coefficients.to(input.dtype), self.U)
        return output

    def frozen(self, input: Tensor) -> Tensor:
        """What the layer computes without its shift, (..., in) -> (..., out)."""
        if self.quantized is None:
            return nn.Linear.forward(self, input)
        return self._quantized()(input)

    def _quantized(self) -> nn.Linear:
        """The quantised layer, which holds what this one holds, also after that was moved or cast."""
        layer: Any = self.quantized
        if layer.weight is not self.weight or layer.bias is not self.bias:
            layer.weight, layer.bias = self.weight, self.bias
        return layer

    def _suit(self, input: Tensor) -> None:
        """A quantised weight does not tell in which type its network computes; the input does."""
        if self.quantized is None or self.side.dtype == input.dtype or torch.is_autocast_enabled(input.device.type):
            return
        for name in ("side", "U", "Vh"):
            setattr(self, name, getattr(self, name).to(input.dtype))

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight as it is stored, also while merged or quantised."""
        return super().base_weight if self.quantized is None else self.stored()

    def merge(self) -> None:
        """As `SVFitLayer.merge`.  Raises SVFitError for a quantised weight, which would be rounded anew."""
        if self.quantized is not None:
            raise SVFitError(
                f"adapters are not merged into {kind_of(self)} weights, which would round them away: open the base "
                "unquantised for that."
            )
        super().merge()

    def to_plain(self) -> nn.Module:
        return super().to_plain() if self.quantized is None else self._quantized().train(self.training)

    def _moved(self, start: Tensor, along: Tensor, gain: Tensor) -> Tensor:
        """start + side^T (gain * (side along)), each of `start`, `along` (..., n) with the short side's n."""
        if not len(self.side):
            return start
        coefficients = F.linear(along, self.side) * gain  # (..., big)
        size, n = self.side.shape
        rows = coefficients.to(start.dtype).reshape(-1, size)
        return torch.addmm(start.reshape(-1, n), rows, self.side).view(start.shape)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """U (out, r), Vh (r, in) that the layer amounts to, in at least float32."""
        W = self.base_weight.to(self.S)  # (out, in)
        side = self.side.to(W)
        if self.in_front:
            U, Vh = (W @ side.mT) / self.S, side
        else:
            U, Vh = side.mT, (side @ W) / self.S[:, None]
        return torch.cat([U, self.U.to(W)], 1), torch.cat([Vh, self.Vh.to(W)])

    def _empty(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")

    def _precise(self) -> dict[str, Tensor]:
        return super()._precise() | {"S": self.S}
