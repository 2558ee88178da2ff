"""Steps and optimizer: how trained values move.  Another rule is another text of this one file.

Every value has a role: "denoiser" and "text_encoder" for singular values of these networks, "word" for the numbers of
a learned word.  A role has one peak rate, all follow one schedule.  AdamW moves a value by about its rate in each step,
however large its gradient is.  Where steps are scaled, value i moves by scale_i times that:

    scale_i = (F_i + floor)^(-1/4), of mean 1        F_i: see sensitivity.py

so values on which everything depends move less than those on which little does.  A rate is "auto" where it follows
from the base at hand.  Steps of independent signs in one layer change the answers p by rate^2 sum_i scale_i^2 F_i in the
mean square, the sum over its values, and n of them by n times that.  Relative to p, what a run of n steps changes is to be
the same in the mean over the layers, for every base, every choice of values and every length:

    rate = CHANGE / sqrt(n) * sqrt(E p^2) / mean over layers of sqrt(sum_i scale_i^2 F_i)

The mean over layers, not the sum over all values: of all layers of a network, the first and last convolution and the
last shortcuts hold nearly all of that sum, and would set the rate of the hundred others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.sensitivity import Sensitivity

POWER = 0.25  # of the sensitivity: 0 are equal steps, 1/2 equal changes of the answers by every value
FLOOR = 0.1  # of the median sensitivity, so that values that never matter do not run away
CHANGE = 1.3e-2  # of the answers by a layer's steps of a whole run, at the peak of the schedule, relative


@dataclass(frozen=True)
class Steps:
    """How far values move in a step at the peak of the schedule, by their names."""

    rates: dict[str, float]
    scales: dict[str, Tensor] = field(
        default_factory=dict
    )  # (r,), of mean 1 over all; a value without moves by its rate

    @property
    def learning_rate(self) -> float:
        """The rate of what comes first, the denoiser, for people to read."""
        return next(iter(self.rates.values()))


def step_scales(sensitivity: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """scale_i of values whose sensitivity is F_i, (r,) each by name, of mean 1 over all that are given.

    The floor is a share of the median over the values that matter at all; where none does, steps are equal.
    """
    every = torch.cat([own.double() for own in sensitivity.values()])
    mattering = every[every > 0]
    floor = FLOOR * mattering.median() if len(mattering) else torch.ones(())
    raw = {name: (own.double() + floor) ** -POWER for name, own in sensitivity.items()}
    mean = torch.cat(list(raw.values())).mean()
    return {name: (own / mean).float() for name, own in raw.items()}


def auto_rate(sensitivity: Mapping[str, Tensor], scales: Mapping[str, Tensor], power: float, steps: int) -> float:
    """The rate at which `steps` steps change the answers by `CHANGE`, see above; 0 where nothing changes them.

    `sensitivity`: F_i of each layer, (r,) by name; `scales`: those of the same names, none where steps are equal;
    `power`: E p^2.
    """
    changes = [
        float((own.double() * scales.get(name, torch.ones(())).double().square()).sum()) ** 0.5
        for name, own in sensitivity.items()
    ]
    return CHANGE * (power / steps) ** 0.5 * len(changes) / sum(changes) if any(changes) else 0.0


def plan_steps(
    roles: Mapping[str, str],
    config: TrainConfig,
    sensitivity: Sensitivity | None = None,
    positions: Mapping[str, Tensor] | None = None,
) -> Steps:
    """The steps that `config` asks for; `roles`: name -> role of all that is trained.

    `sensitivity`: of its layers, where scales or rates follow from it.  `positions`: which of a layer's values are
    trained, see `choose_positions`; None: all that were measured.
    """
    own: dict[str, Tensor] = {}
    if sensitivity is None and needs_sensitivity(config):
        raise SVFitError("steps by sensitivity need the base's: measure it, or give learning_rate a number.")
    if sensitivity is not None:
        own = {name: sensitivity.values[name] for name in roles if name in sensitivity.values}
        if positions is not None:
            own = {name: values[positions[name]] for name, values in own.items()}
    scales = step_scales(own) if config.step_scaling == "sensitivity" else {}
    given = {"denoiser": config.learning_rate, "text_encoder": config.text_encoder_lr, "word": config.learned_word_lr}
    auto = {name: values for name, values in own.items() if given[roles[name]] == "auto"}
    rate = auto_rate(auto, scales, 0.0 if sensitivity is None else sensitivity.power, config.max_train_steps)
    rates = {role: rate if value == "auto" else float(value) for role, value in given.items()}
    return Steps({name: rates[role] for name, role in roles.items()}, scales)


def needs_sensitivity(config: TrainConfig) -> bool:
    """Whether the steps that `config` asks for follow from the base's sensitivity."""
    return config.step_scaling == "sensitivity" or "auto" in (config.learning_rate, config.text_encoder_lr)


def parameter_groups(values: Mapping[str, nn.Parameter], steps: Steps) -> list[dict[str, Any]]:
    """The groups of `ScaledAdamW` for `values` by name: one for each rate, so few and large ones.

    Each holds "params", their "scales", and their rate as "lr" and "peak".
    """
    groups = []
    for rate in dict.fromkeys(steps.rates[name] for name in values):
        names = [name for name in values if steps.rates[name] == rate]
        scales = [None if name not in steps.scales else steps.scales[name].to(values[name].detach()) for name in names]
        groups.append({"params": [values[name] for name in names], "scales": scales, "peak": rate, "lr": rate})
    return groups


class ScaledAdamW(torch.optim.AdamW):
    """AdamW in which every number may have a step size of its own.

    Groups may hold "scales": for each of their "params" a tensor of its shape, or None for equal steps.  What AdamW
    would add to a parameter, its decay too, is multiplied by the scale.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        scaled = [(value, scale, value.clone()) for value, scale in self._scaled()]
        loss = super().step(closure)
        for value, scale, before in scaled:
            value.copy_(before + scale * (value - before))
        return loss

    def _scaled(self) -> Iterator[tuple[Tensor, Tensor]]:
        for group in self.param_groups:
            for value, scale in zip(group["params"], group.get("scales", ()), strict=False):
                if scale is not None:
                    yield value, scale


class Optimizer:
    """ScaledAdamW over named values, under one schedule."""

    def __init__(self, values: Mapping[str, nn.Parameter], steps: Steps, config: TrainConfig) -> None:
        """`values`: what is trained, by name."""
        self.values = values
        self.inner = ScaledAdamW(
            parameter_groups(values, steps),
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        schedule = get_scheduler(
            config.lr_scheduler,
            optimizer=self.inner,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.schedule: Callable[[int], float] = schedule.lr_lambdas[0]  # step -> share of the peak

    def set_rates(self, step: int, factor: float) -> float:
        """Sets the rates of `step`, times `factor`; returns their share of the peak."""
        share = factor * self.schedule(step)
        for group in self.inner.param_groups:
            group["lr"] = group["peak"] * share
        return share

    def memory(self) -> dict[str, Tensor]:
        """Copies on the CPU of what AdamW remembers of each value, by "<name>.<key>"."""
        return {
            f"{name}.{key}": tensor.detach().to("cpu", copy=True)
            for name, value in self.values.items()
            for key, tensor in self.inner.state.get(value, {}).items()
        }

    def restore(self, memory: Mapping[str, Tensor]) -> None:
        """Puts back what `memory` gave; what it does not hold is forgotten."""
        self.inner.state.clear()
        self.inner.zero_grad()  # accelerate's own does nothing in the middle of a step
        for full_name, tensor in memory.items():
            name, _, key = full_name.rpartition(".")
            value = self.values[name]
            # AdamW keeps its step count on the CPU, the rest beside the value
            copy = tensor.clone() if tensor.ndim == 0 else tensor.to(value.device, copy=True)
            self.inner.state[value][key] = copy
