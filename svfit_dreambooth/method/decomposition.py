"""The singular value decomposition of one weight, and how much of it is kept.

The symbols are those of `layer.py`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from svfit_dreambooth.errors import SVFitError

Rank = int | Literal["full"]

# The Gram matrix squares the condition number.  Below this ratio of smallest to largest singular value its
# eigenvectors keep fewer than about six digits in float64, and the plain SVD is used instead.
GRAM_CONDITION = 1e-5


def as_matrix(weight: Tensor) -> Tensor:
    """The weight of a linear layer (out, in) as it is, that of a convolution as (out, in / groups * h * w)."""
    return weight.flatten(1)


def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Rows and columns of the weight of a linear layer, quantised or not, or of a convolution, as a matrix."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape[0], weight[0].numel()


def resolve_rank(S: Tensor, rank: Rank = "full", energy: float | None = None) -> int:
    """How many singular values to keep of a layer whose singular values are `S` (k,), largest first.

    `rank`: a number, capped at the k that the layer has, or "full".  `energy`, between 0 and 1, takes its
    place: the smallest r whose part of the squared Frobenius norm reaches it,
    sum_{i<=r} S_i^2 >= energy * sum_i S_i^2  (our reading of the paper's "over 99% of the information").
    Raises SVFitError for a rank below 1 and an energy outside (0, 1].
    """
    if energy is not None:
        if not 0 < energy <= 1:
            raise SVFitError(f"energy is {energy}, but it is a share: give a number above 0 and at most 1.")
        cumulative = S.double().square().cumsum(0)  # (k,)
        return min(int((cumulative < energy * cumulative[-1]).sum()) + 1, len(S))
    if rank == "full":
        return len(S)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise SVFitError(f'rank is {rank!r}: give a whole number of 1 or more, or "full".')
    return min(rank, len(S))


def decompose(
    weight: Tensor, rank: Rank = "full", *, energy: float | None = None, driver: Literal["eigh", "svd"] = "eigh"
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of `weight` (out, in): U (out, r), S (r,), Vh (r, in).

    Computed and returned in float64, whatever the type of `weight`, and on its device (on the CPU where the
    device has no float64).  `rank` and `energy` choose r as in `resolve_rank`.  `driver`: "eigh" takes the
    eigenvectors of the smaller Gram matrix and derives the other side from u_i = W v_i / S_i, about twice as
    fast as "svd"; nearly singular weights go to "svd" in any case.
    Raises SVFitError for a weight that is not a finite matrix.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        raise SVFitError(
            f"only a matrix of floating-point numbers can be decomposed, not a {weight.dtype} tensor of shape "
            f"{tuple(weight.shape)} on {weight.device.type}."
        )
    if weight.device.type == "mps":
        weight = weight.cpu()
    W = weight.detach().double()  # (out, in)
    if not torch.isfinite(W).all():
        raise SVFitError("the weight holds NaN or infinite values and cannot be decomposed: check the base model.")
    factors = _gram_svd(W) if driver == "eigh" else None
    U, S, Vh = factors or torch.linalg.svd(W, full_matrices=False)
    r = resolve_rank(S, rank, energy)
    return U[:, :r].contiguous(), S[:r].contiguous(), Vh[:r].contiguous()


def _gram_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The SVD of a float64 matrix by way of W W^T, its short side first; None where that loses digits."""
    wide = W.shape[0] <= W.shape[1]
    A = W if wide else W.mT  # (k, n), k <= n
    eigenvalues, vectors = torch.linalg.eigh(A @ A.mT)  # (k,), (k, k), smallest first
    S = eigenvalues.clamp(min=0).sqrt().flip(0)  # (k,)
    if S[-1] <= GRAM_CONDITION * S[0]:
        return None
    short = vectors.flip(1)  # (k, k), columns are singular vectors
    long = (short.mT @ A) / S[:, None]  # (k, n)
    return (short, S, long) if wide else (long.mT, S, short.mT)
