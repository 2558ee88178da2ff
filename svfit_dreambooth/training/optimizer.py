"""Rates and optimizer: how trained values move.  Another rule is another text of this one file.

Every value has a role: "denoiser" and "text_encoder" for singular values of these networks, "word" for the numbers of
a learned word.  A role has one peak rate, all follow one schedule.
"""

from collections.abc import Callable, Mapping

import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from svfit_dreambooth.training.config import TrainConfig


def peak_rates(roles: Mapping[str, str], config: TrainConfig) -> dict[str, float]:
    """The learning rate of each value at its highest, by the value's name; `roles`: name -> role."""
    by_role = {
        "denoiser": config.learning_rate,
        "text_encoder": config.text_encoder_lr,
        "word": config.learned_word_lr,
    }
    return {name: by_role[role] for name, role in roles.items()}


class Optimizer:
    """AdamW over named values, under one schedule."""

    def __init__(self, values: Mapping[str, nn.Parameter], rates: Mapping[str, float], config: TrainConfig) -> None:
        """`values`: what is trained, by name; `rates`: peak learning rate of each."""
        self.values = values
        groups = [  # few and large ones, which a GPU updates in a few calls
            {"params": [values[name] for name in values if rates[name] == rate], "peak": rate, "lr": rate}
            for rate in dict.fromkeys(rates[name] for name in values)
        ]
        self.inner = torch.optim.AdamW(
            groups,
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
