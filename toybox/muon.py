"""Muon: steps for matrices that move all their directions alike."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that drives singular values toward 1, by Keller Jordan


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """About U Vh of `matrix` = U diag(S) Vh, (rows, columns), by Newton-Schulz iterations in its own precision."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    X = (matrix.mT if tall else matrix) / (matrix.norm() + 1e-7)  # (short, long)
    for _ in range(iterations):
        gram = X @ X.mT  # (short, short)
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
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
            updates = []
            for number, parameter in enumerate(parameters):
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(group["momentum"]).add_(parameter.grad)
                if number % ranks == rank:
                    ahead = parameter.grad.add(momentum, alpha=group["momentum"])  # Nesterov's
                    updates.append(orthogonalise(ahead.flatten(1)).flatten())
                else:
                    updates.append(torch.zeros_like(parameter).flatten())
            together = torch.cat(updates)
            if ranks > 1:
                dist.all_reduce(together)
            for parameter, update in zip(parameters, together.split([p.numel() for p in parameters]), strict=True):
                longest = max(parameter.shape[0], parameter[0].numel())
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-0.2 * group["lr"] * longest**0.5)
