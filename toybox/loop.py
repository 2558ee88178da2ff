"""The training loop that all stages of pre-training share: budgets, averaging, checkpoints, resuming."""

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from toybox.muon import Muon


@dataclass(frozen=True)
class Budget:
    """How long to train: whichever limit comes first. At least one must be given."""

    minutes: float | None = None  # minutes of training, those before an interruption included; None: no limit
    max_steps: int | None = None  # optimizer steps; None: no limit

    def fraction(self, seconds: float, step: int) -> float:
        """The share of the budget that is spent, 1 or more at the end."""
        if self.minutes is None and self.max_steps is None:
            raise ValueError("training needs a limit: give minutes, max_steps or both")
        spent = [seconds / (60 * self.minutes)] if self.minutes else []
        return max([*spent, step / self.max_steps] if self.max_steps else spent)


def rate_factor(fraction: float, warmup: float = 0.02, hold: float = 0.7) -> float:
    """Learning rate as a share of its peak: a linear rise, a plateau, and a cosine descent to zero at fraction 1.

    It follows the share of the *budget*, not the number of steps: a busy machine makes fewer steps, not a worse end.
    """
    if fraction < warmup:
        return max(0.01, fraction / warmup)
    if fraction < hold:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - hold) / (1 - hold))))


def average_share(step: int, fraction: float, ema_decay: float) -> float:
    """How far the averaged weights go toward the present ones in a step: 1 - ema_decay while the rate is at its peak.

    More at the beginning, to forget it, and as the rate falls, so that the average ends at the last weights.
    """
    return min(1.0, max((1 - ema_decay) / max(rate_factor(fraction), 1e-6), 9 / (10 + step)))


def fit(
    modules: nn.ModuleDict,
    compute_loss: Callable[[int], Tensor],
    checkpoint: Path,
    budget: Budget,
    learning_rates: dict[str, float],
    accelerator: Accelerator,
    muon_rate: float | None = None,
    ema_decay: float = 0.998,
    log_every: int = 50,
    save_minutes: float = 3.0,
    sample_every: int | None = None,
    sample: Callable[[int], None] | None = None,
) -> int:
    """Minimise `compute_loss(step)` until the budget is spent, then leave the averaged weights in `modules`.

    `checkpoint` is read if it exists, so that a run that was stopped goes on where it was, and replaced as a whole
    every `save_minutes` and when the run is interrupted. `learning_rates` has AdamW's peak rate for each of `modules`;
    with a `muon_rate` Muon takes over their inner matrices, those neither of a first nor of a last layer.
    `sample(step)` is called with the averaged weights in place every `sample_every` steps. Returns the number of
    steps made in all. Several processes (started by `accelerate launch` or `torchrun`) share each step: `compute_loss`
    then gets a number of its own in each of them, and the gradients are averaged.
    """
    modules.to(accelerator.device).train()
    parameters: list[Any] = [parameter for name in learning_rates for parameter in modules[name].parameters()]
    matrices = inner_matrices(modules, learning_rates) if muon_rate else []
    inner = {id(parameter) for parameter in matrices}
    groups: list[dict[str, Any]] = [
        {"params": [each for each in modules[name].parameters() if id(each) not in inner], "peak": rate}
        for name, rate in learning_rates.items()
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)]
    if muon_rate:
        optimizers.append(Muon([{"params": matrices, "peak": muon_rate}], lr=muon_rate))  # type: ignore[list-item]
    average = [parameter.detach().clone() for parameter in parameters]
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        modules.load_state_dict(state["modules"])
        for optimizer, memory in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(memory)
        average = [value.to(accelerator.device) for value in state["average"]]
        step, seconds = state["step"], state["seconds"]
    started, saved, recent = time.monotonic() - seconds, time.monotonic(), []

    def save() -> None:
        if not accelerator.is_main_process:
            return
        save_atomically(
            {
                "modules": modules.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "average": average,
                "step": step,
                "seconds": time.monotonic() - started,
            },
            checkpoint,
        )

    try:
        while (fraction := agree(budget.fraction(time.monotonic() - started, step), accelerator)) < 1:
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = group["peak"] * rate_factor(fraction)
            with accelerator.autocast():
                loss = compute_loss(step * accelerator.num_processes + accelerator.process_index)
            loss.backward()
            average_gradients(parameters, accelerator)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            share = average_share(step, fraction, ema_decay)
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, share)
            recent.append(loss.detach())
            if step % log_every == 0 and accelerator.is_main_process:
                minutes = (time.monotonic() - started) / 60
                mean = torch.stack(recent).mean().item()
                print(f"{checkpoint.stem} step {step} {minutes:.1f} min {fraction:.0%} loss {mean:.4f}", flush=True)
                recent.clear()
            if time.monotonic() - saved > 60 * save_minutes:
                save()
                saved = time.monotonic()
            if sample and sample_every and step % sample_every == 0 and accelerator.is_main_process:
                trained = [parameter.detach().clone() for parameter in parameters]
                copy_into(parameters, average)
                modules.eval()
                sample(step)
                modules.train()
                copy_into(parameters, trained)
    finally:
        save()  # also when interrupted
    copy_into(parameters, average)
    modules.eval()
    return step


def inner_matrices(modules: nn.ModuleDict, names: Iterable[str]) -> list[Tensor]:
    """The weights of linear layers and convolutions of the named modules, but for their first and last ones."""
    return [
        layer.weight
        for name in names
        for path, layer in modules[name].named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and path not in ("conv_in", "conv_out")
    ]


def agree(fraction: float, accelerator: Accelerator) -> float:
    """The main process's fraction: clocks differ, but all processes must stop at the same step."""
    if accelerator.num_processes == 1:
        return fraction
    return broadcast(torch.tensor(fraction, device=accelerator.device)).item()


def average_gradients(parameters: list[nn.Parameter], accelerator: Accelerator) -> None:
    """Give every process the mean of all gradients; the weights then stay equal without being sent."""
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def averaged_state(checkpoint: Path, modules: nn.ModuleDict, names: list[str]) -> nn.ModuleDict:
    """Put the averaged weights of a checkpoint into `modules`; `names` is the order of `learning_rates` in `fit`."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    modules.load_state_dict(state["modules"])
    copy_into([parameter for name in names for parameter in modules[name].parameters()], state["average"])
    return modules.eval()


def copy_into(targets: list[nn.Parameter], sources: list[Tensor]) -> None:
    """Overwrite parameters with tensors of the same shapes."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def save_atomically(state: dict, path: Path) -> None:
    """`torch.save`, but the file is either the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
