"""SVFit on one layer, linear or convolution: train the singular values, freeze everything else.

Sun et al., "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
2024, arXiv:2409.05926.  The symbols are the paper's, spelled as `torch.linalg.svd` spells them:

    W       (out, in)   the frozen weight of a linear layer, or of a convolution as a matrix (out, in * h * w)
    U       (out, r)    its first r left singular vectors, frozen
    S       (r,)        its first r singular values, largest first
    Vh      (r, in)     its first r right singular vectors, already transposed, frozen
    W_e     (out, in)   the residual W - U diag(S) Vh, frozen
    shift   (r,)        what training adds to S: S_trained - S, zero at the start

The paper's layer computes W' = U diag(S + shift) Vh + W_e.  Since W = U diag(S) Vh + W_e, the same layer is

    W' = W + U diag(shift) Vh

and this second form is the one used here: W stays untouched, so an untrained layer computes what the base
computes, to the bit, and taking the layer out again is exact.

A convolution multiplies every patch of its input, flattened to (in * h * w,), by W: reshaped so, it is a linear
layer whose tokens are places (as in SVDiff, Han et al., 2023, arXiv:2303.11305).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import delta, exact_delta, kept_precise, merged_weight, shift_dtype
from svfit_dreambooth.method.decomposition import matrix_shape
from svfit_dreambooth.method.mixed import Mixed


def merged_is_cheaper(tokens: int, in_features: int, out_features: int, rank: int, training: bool) -> bool:
    """Which route costs fewer multiply-adds for `tokens` rows of input: the rule in one place.

    factored    x W^T + ((x Vh^T) * shift) U^T    tokens * rank * (in + out), twice when training
    merged      x (W + U diag(shift) Vh)^T        rank * out * in; training adds the gradient dY^T X of W',
                                                  tokens * out * in, and again rank * out * in

    For a convolution a token is a place of its output, and `in_features` is in * h * w.
    """
    factored = tokens * rank * (in_features + out_features)
    merged = rank * out_features * in_features
    if training:
        factored, merged = 2 * factored, 2 * merged + tokens * out_features * in_features
    return merged < factored


class SVFitLayer(nn.Module):
    """What `SVFitLinear` and `SVFitConv2d` share: y = f(x; W + U diag(shift) Vh), with only `shift` to be trained.

    `weight` and `bias` keep their names, so a checkpoint of the base loads into the patched model.  U and Vh
    are buffers that no state dict repeats: they follow from the weight.  `shift` is float32, or float64 under a
    float64 weight, and stays so through `.half()`, `.bfloat16()` and `.to(dtype)`: near 1, bfloat16 cannot hold
    a step of 1e-3.

    `shift` may also be (batch, 1, r), a value of its own for every sample of a batch; a batch of another size raises
    SVFitError, unless the layer is `folded`.
    """

    folded = False  # whether the network gives each sample several rows of the batch, side by side
    weight: Any  # nn.Parameter, as the layer's own class declares it
    bias: Any
    U: Tensor
    Vh: Tensor

    def _take_over(self, layer: nn.Linear | nn.Conv2d, U: Tensor, Vh: Tensor) -> None:
        """The parameters of `layer` (the same objects) and a shift of zeros for the basis U (out, r), Vh (r, in)."""
        rank, (out, into) = U.shape[-1], matrix_shape(layer)
        if U.shape != (out, rank) or Vh.shape != (rank, into):
            raise SVFitError(
                f"a basis of shapes {tuple(U.shape)} and {tuple(Vh.shape)} does not fit a weight of shape {(out, into)}."
            )
        self.weight = weight = layer.weight
        self.bias = layer.bias
        self.shift = nn.Parameter(torch.zeros(rank, device=weight.device, dtype=shift_dtype(weight.dtype)))
        self.unmerged_weight: Tensor | None = None
        self.mixed: Mixed | None = None  # how the samples of a batch share the rows of a shift, where that is known
        self.train(layer.training)

    def _hold(self, **sides: Tensor) -> None:
        """Keeps parts of the basis, where the weight is and in its type; beside integers in float32."""
        dtype = self.weight.dtype if self.weight.is_floating_point() else torch.float32
        for name, side in sides.items():
            self.register_buffer(name, side.to(self.weight.device, dtype), persistent=False)

    @property
    def rank(self) -> int:
        return self.shift.shape[-1]

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight, also while merged."""
        return self.weight.detach() if self.unmerged_weight is None else self.unmerged_weight

    def shift_of(self, input: Tensor) -> Tensor:
        """The shift in the shape that the batch `input` needs: (r,), or (batch, 1, r) with as many rows."""
        if self.shift.ndim == 1 or len(self.shift) == len(input):
            return self.shift
        rows, left = divmod(len(input), len(self.shift))
        if left or not self.folded:
            raise SVFitError(f"the shifts of {len(self.shift)} samples meet a batch of {len(input)}.")
        return self.shift.repeat_interleave(rows, 0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """U (out, r), Vh (r, in)."""
        return self.U, self.Vh

    def delta(self) -> Tensor:
        """U diag(shift) Vh in the shape of the weight: what the adapter adds to it."""
        U, Vh = self.factors()
        return delta(U, self.shift, Vh).view(self.weight.shape)

    def exact_delta(self) -> Tensor:
        """The same as a matrix (out, in), in at least float32, without gradient."""
        U, Vh = self.factors()
        return exact_delta(U, self.shift.detach(), Vh)

    @torch.no_grad()
    def merge(self) -> None:
        """Writes W + delta into the weight, which then costs nothing extra; W is kept, as (W + D) - D is not W."""
        if self.unmerged_weight is not None:
            return
        if self.shift.ndim != 1:
            raise SVFitError(
                f"a shift of shape {tuple(self.shift.shape)}, one per sample, has no single merged weight."
            )
        total = merged_weight(self.weight, self.exact_delta())
        self.unmerged_weight = self.weight.detach().clone()  # the last that may run out of memory
        self.weight.copy_(total)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back the kept weight, to the bit."""
        if self.unmerged_weight is not None:
            self.weight.copy_(self.unmerged_weight)
            self.unmerged_weight = None

    def to_plain(self) -> nn.Module:
        """The layer that was here before, with the same parameter objects and the base's own weight."""
        self.unmerge()
        plain = self._empty()
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)

    def _empty(self) -> nn.Module:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def _precise(self) -> dict[str, Tensor]:
        """What stays at least float32 when the layer is cast."""
        return {"shift": self.shift}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SVFitLayer:
        with kept_precise(self._precise, lambda: shift_dtype(self.weight.dtype)):
            super()._apply(fn, recurse)
        if self.unmerged_weight is not None:
            self.unmerged_weight = fn(self.unmerged_weight)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A base checkpoint knows nothing of shifts: it loads, also with strict=True, and leaves them as they are.
        self.unmerge()
        state_dict.setdefault(prefix + "shift", self.shift.data)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SVFitLinear(SVFitLayer, nn.Linear):
    """y = x (W + U diag(shift) Vh)^T + b; see `SVFitLayer`."""

    def __init__(self, linear: nn.Linear, U: Tensor, Vh: Tensor) -> None:
        """Takes over the parameters of `linear` (the same objects) with the basis U (out, r), Vh (r, in)."""
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self._take_over(linear, U, Vh)
        self._hold(U=U, Vh=Vh)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        if self.unmerged_weight is not None:
            return nn.Linear.forward(self, input)
        each = self.shift_of(input).ndim == 3  # a weight for every sample, and its own tokens alone
        mixed = None if self.folded else self.mixed
        weights = len(mixed.shifts) if mixed is not None else len(input) if each else 1
        tokens = input.numel() // self.in_features // weights
        training = torch.is_grad_enabled() and self.shift.requires_grad
        cheap = merged_is_cheaper(tokens, self.in_features, self.out_features, self.rank, training)
        if mixed is not None:
            each_mix = mixed.weights(self.weight.detach(), self.U, self.Vh, cheap)
            return self.forward_factored(input) if each_mix is None else mixed.linear(input, each_mix, self.bias)
        if cheap:
            return self.forward_merged(input)
        return self.forward_factored(input)

    def forward_factored(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        shift = self.shift_of(input)
        if shift.ndim == 3:  # one per sample: (batch, 1, r) to as many dimensions as the input has
            shift = shift.reshape(-1, *(1 for _ in range(input.ndim - 2)), self.rank)
        coefficients = F.linear(input, self.Vh) * shift  # (..., r)
        return nn.Linear.forward(self, input) + F.linear(coefficients.to(input.dtype), self.U)

    def forward_merged(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        shift = self.shift_of(input)
        if shift.ndim == 1:
            return F.linear(input, self.weight + self.delta().to(self.weight.dtype), self.bias)
        weights = self.weight + delta(self.U, shift, self.Vh).to(self.weight.dtype)  # (batch, out, in)
        output = input.flatten(1, -2) if input.ndim > 2 else input[:, None]  # (batch, tokens, in)
        output = output @ weights.mT  # (batch, tokens, out)
        if self.bias is not None:
            output = output + self.bias
        return output.view(*input.shape[:-1], self.out_features)

    def _empty(self) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")


class SVFitConv2d(SVFitLayer, nn.Conv2d):
    """y = conv(x, W + U diag(shift) Vh) + b, the matrices (out, in / groups * h * w); see `SVFitLayer`.

    The factored route convolves with the r rows of Vh, then mixes the r channels by U, place by place.  It does not
    exist where channels come in groups, each of which sees other inputs under the same Vh: there only the merged
    route serves, and no shift per sample.
    """

    def __init__(self, conv: nn.Conv2d, U: Tensor, Vh: Tensor) -> None:
        """Takes over the parameters of `conv` with the basis U (out, r), Vh (r, in / groups * h * w)."""
        super().__init__(**_conv_options(conv))
        self._take_over(conv, U, Vh)
        self._hold(U=U, Vh=Vh)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height', width')"""
        if self.unmerged_weight is not None:
            return nn.Conv2d.forward(self, input)
        if self.shift.ndim == 1:
            places = input.numel() // input.shape[-3] // (self.stride[0] * self.stride[1])  # near enough at the borders
            training = torch.is_grad_enabled() and self.shift.requires_grad
            if self.groups > 1 or merged_is_cheaper(places, self.Vh.shape[1], self.out_channels, self.rank, training):
                return self.forward_merged(input)
        return self.forward_factored(input)

    def forward_factored(self, input: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height', width')"""
        if self.groups > 1:
            raise SVFitError(
                f"a convolution of {self.groups} groups works only with one shift for all samples, "
                f"not with one of shape {tuple(self.shift.shape)}."
            )
        kernels = self.Vh.view(self.rank, *self.weight.shape[1:])  # (r, in, h, w)
        shift = self.shift_of(input)
        shift = shift.reshape(-1, self.rank, 1, 1) if shift.ndim == 3 else shift[:, None, None]
        coefficients = self._conv_forward(input, kernels, None) * shift  # (batch, r, height', width')
        mixed = F.conv2d(coefficients.to(input.dtype), self.U[:, :, None, None])  # (batch, out, height', width')
        return nn.Conv2d.forward(self, input) + mixed

    def forward_merged(self, input: Tensor) -> Tensor:
        """(batch, in, height, width) -> (batch, out, height', width')"""
        return self._conv_forward(input, self.weight + self.delta().to(self.weight.dtype), self.bias)

    def _empty(self) -> nn.Conv2d:
        return nn.Conv2d(**_conv_options(self))


def _conv_options(conv: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None, "device": "meta"}
