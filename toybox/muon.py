"""Muon: steps for matrices that move all their directions alike."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values toward 1, by Keller Jordan


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About U Vh of each M = U diag(S) Vh, (..., rows, columns), by Newton-Schulz iterations in its own precision."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    X = matrices.mT if tall else matrices  # (..., short, long)
    X = X / (torch.linalg.matrix_norm(X, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = X @ X.mT  # (..., short, short)
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X.mT if tall else X


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr * decay) W - 0.2 lr sqrt(max(out, in)) orthogonalise(momentum), as of Liu et al., 2025
    (arXiv 2502.16982), whose factor lets it share AdamW's rates.  A convolution counts as (out, in * h * w).

    `torch.optim.Muon` takes no convolutions and computes in bfloat16, ten times slower than float32 on processors
    without it.  Several processes with equal gradients share the work.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            ahead = torch._foreach_add(gradients, momenta, alpha=group["momentum"])  # Nesterov's
            alike: dict[torch.Size, list[int]] = {}  # of one shape: a GPU takes them together
            for number in range(rank, len(parameters), ranks):
                alike.setdefault(ahead[number].flatten(1).shape, []).append(number)
            updates = [torch.zeros_like(each).flatten() for each in ahead]
            for numbers in alike.values():
                found = orthogonalise(torch.stack([ahead[number].flatten(1) for number in numbers]))
                for number, update in zip(numbers, found, strict=True):
                    updates[number] = update.flatten()
            if ranks > 1:
                together = torch.cat(updates)
                dist.all_reduce(together)
                updates = list(together.split([p.numel() for p in parameters]))
            for parameter, update in zip(parameters, updates, strict=True):
                longest = max(parameter.shape[0], parameter[0].numel())
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-0.2 * group["lr"] * longest**0.5)
