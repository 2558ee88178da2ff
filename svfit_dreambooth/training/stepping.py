"""One optimizer step: the loss of its micro-batches, gradients, their length, the update at this step's rates."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.events import Stepped
from svfit_dreambooth.training.keep_base import KeptBase
from svfit_dreambooth.training.objective import Loss, Objective
from svfit_dreambooth.training.optimizer import Optimizer, Steps

MAX_SKIPPED = 30  # steps in a row; fp16 begins with a loss scale of 2^16, and each one halves it


class Losses(NamedTuple):
    """What a micro-batch is told by, means over all processes; before their weights."""

    instance: float  # of the photos
    prior: float | None  # of the class pictures; None: without prior preservation
    base: float | None = None  # squared distance from the base's answers; None: without keep_base


class NotFinite(Exception):
    """A loss or gradient that is NaN or infinite; the message names it."""


class Stepping:
    """The values of a run, how they move, and how many steps they have made."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        objective: Objective,
        modules: Sequence[nn.Module],
        values: Mapping[str, nn.Parameter],
        steps: Steps,
        kept_base: KeptBase | None = None,
    ) -> None:
        """See `Loop`."""
        self.config, self.accelerator, self.objective, self.modules = config, accelerator, objective, modules
        self.values, self.steps, self.kept_base = values, steps, kept_base
        self.optimizer = Optimizer(values, steps, config)
        self.stepper = accelerator.prepare_optimizer(self.optimizer.inner)
        self.step, self.rate_factor, self.skipped = 0, 1.0, 0
        self.between_steps = True  # False while values, optimizer and step disagree

    def make_step(self) -> Stepped:
        """One optimizer step over all micro-batches.

        Raises NotFinite for a loss or gradient that is not finite, and as `end_step` does.
        """
        share = self.start_step()
        count = self.config.gradient_accumulation_steps
        return self.end_step(share, [self.accumulate(self.step * count + micro) for micro in range(count)])

    def start_step(self) -> float:
        """Sets the rates of the next step; returns their share of the peak."""
        share = self.optimizer.set_rates(self.step, self.rate_factor)
        self.between_steps = False
        return share

    def end_step(self, share: float, losses: Sequence[Losses]) -> Stepped:
        """Counts the step that was made at `share` of the peak rates; `losses`: of its micro-batches, see `accumulate`.

        Raises SVFitError where fp16's loss scaling has skipped `MAX_SKIPPED` steps in a row.
        """
        self.skipped = self.skipped + 1 if self.stepper.step_was_skipped else 0
        if self.skipped == MAX_SKIPPED:  # no value has changed since, so there is nothing to return to
            raise SVFitError(
                f"the gradients of {MAX_SKIPPED} steps in a row, up to step {self.step + 1}, are not finite: "
                "lower learning_rate, or use mixed_precision no."
            )
        self.step += 1
        self.between_steps = True
        return Stepped(
            self.step,
            self.config.max_train_steps,
            sum(each.instance for each in losses) / len(losses),
            self.steps.learning_rate * share,
            _mean([each.prior for each in losses]),
            base_loss=_mean([each.base for each in losses]),
        )

    def accumulate(self, number: int) -> Losses:
        """Adds up the gradient of micro-batch `number`, and steps after the last one of a step."""
        accelerator = self.accelerator
        with accelerator.accumulate(*self.modules):
            loss = self.objective.loss(number, accelerator.process_index, accelerator.num_processes)
            told = self.checked(loss)  # before it reaches the values
            accelerator.backward(loss.total)
            told = self.held_to_base(number, told)
            self.descend()
        return told

    def checked(self, loss: Loss) -> Losses:
        """The losses on the photos and on the class pictures.  Raises NotFinite for one that is none."""
        instance, prior, total = (
            None if part is None else float(self.accelerator.reduce(part.detach(), "mean").item())
            for part in (loss.instance, loss.prior, loss.total)
        )
        assert instance is not None and total is not None
        self.check(math.isfinite(total), f"the loss is {total}")
        return Losses(instance, prior)

    def held_to_base(self, number: int, told: Losses) -> Losses:
        """Where the run keeps its base, adds the gradient of the distance from it, and names that in `told`.

        In a pass of its own, after that of the photos has left the memory.  Raises NotFinite as `checked` does.
        """
        if self.kept_base is None:
            return told
        accelerator = self.accelerator
        distance = self.kept_base.loss(number, accelerator.process_index, accelerator.num_processes)
        base = float(accelerator.reduce(distance.detach(), "mean").item())
        self.check(math.isfinite(base), f"the distance from the base is {base}")
        accelerator.backward(self.config.keep_base_weight * distance)
        return told._replace(base=base)

    def gradient_scale(self) -> float:
        """What a micro-batch's loss is multiplied by before its backward pass, as `Accelerator.backward` does."""
        share, scaler = 1 / self.config.gradient_accumulation_steps, self.accelerator.scaler
        return share if scaler is None else share * float(scaler.scale(torch.ones((), device=self.accelerator.device)))

    def descend(self) -> None:
        """Follows the gradients that were added up, after the last micro-batch of a step."""
        accelerator = self.accelerator
        if accelerator.sync_gradients:
            norm = accelerator.clip_grad_norm_(list(self.values.values()), self.config.max_grad_norm)
            # with fp16 the loss scaling meets infinite gradients by design, and skips their step
            if accelerator.scaler is None:
                self.check(bool(torch.isfinite(norm)), f"the gradient's length is {norm}")
        self.stepper.step()
        self.stepper.zero_grad()

    def check(self, finite: bool, what: str) -> None:
        if not finite:
            raise NotFinite(f"{what} at step {self.step + 1}")


def _mean(numbers: Sequence[float | None]) -> float | None:
    """Of what micro-batches have; None where they have nothing."""
    known = [number for number in numbers if number is not None]
    return sum(known) / len(known) if known else None
