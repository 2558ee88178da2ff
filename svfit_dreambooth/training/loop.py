"""The steps of a run: loss, update, learning rate, falling back from bad numbers, looks, checkpoints."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import nn
from tqdm.auto import tqdm

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.checkpoints import Best, TrainState, capture, restore, save_checkpoint
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.events import Event, Painted, Saved, Stepped, WentBack
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.objective import Denoiser
from svfit_dreambooth.training.watch import Watch, score

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 3
MAX_SKIPPED = 30  # steps in a row; fp16 begins with a loss scale of 2^16, and each one halves it


Step = Stepped  # what `on_step` is told after every optimizer step


class NotFinite(Exception):
    """A loss or gradient that is NaN or infinite; the message names it."""


class Loop:
    """Where a run stands: the values it trains, their optimizer, the last good state, the best one so far."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        model: Denoiser,
        modules: list[nn.Module],
        values: Mapping[str, nn.Parameter],
        rates: Mapping[str, float],
        identity: Mapping[str, Any],
        watch: Watch | None,
    ) -> None:
        """`values`: what is trained, by name; `rates`: peak learning rate of each; `modules`: what they belong to.

        `identity`: see `save_checkpoint`.  `watch`: None paints and measures nothing on the way.
        """
        self.config, self.accelerator, self.model, self.modules = config, accelerator, model, modules
        self.values, self.identity, self.watch = values, identity, watch
        groups = [  # few and large ones, which a GPU updates in a few calls
            {"params": [values[name] for name in values if rates[name] == rate], "peak": rate, "lr": rate}
            for rate in dict.fromkeys(rates.values())
        ]
        self.raw_optimizer = torch.optim.AdamW(
            groups,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        schedule = get_scheduler(
            config.lr_scheduler,
            optimizer=self.raw_optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        self.multiplier: Callable[[int], float] = schedule.lr_lambdas[0]
        self.optimizer = accelerator.prepare_optimizer(self.raw_optimizer)
        self.folder = RunFolder(config.output_dir)
        self.step, self.rate_factor, self.rollbacks, self.skipped = 0, 1.0, 0, 0
        self.best: Best | None = None
        self.good = self.state()
        self.between_steps = True  # False while values, optimizer and step disagree

    def state(self) -> TrainState:
        """A copy of where the run stands."""
        values, memory = capture(self.values, self.raw_optimizer)
        scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        return TrainState(self.step, values, memory, self.rate_factor, self.rollbacks, self.best, scaler)

    def go_to(self, state: TrainState) -> None:
        """Puts the run where `state` stood."""
        restore(state, self.values, self.raw_optimizer)
        self.raw_optimizer.zero_grad()  # accelerate's own does nothing in the middle of a step
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.accelerator.step = 0  # it counts micro-batches, and may have been left in the middle of a step
        self.step, self.rate_factor, self.rollbacks = state.step, state.rate_factor, state.rollbacks
        self.best = None if self.watch is None else state.best  # nothing would be compared with it
        self.good, self.between_steps, self.skipped = state, True, 0

    def run(self, on_step: Callable[[Step], bool | None] | None, stop_asked: Callable[[], bool]) -> bool:
        """Makes the steps that are left; returns whether it was asked to stop before the last one.

        Raises SVFitError when numbers stayed bad after `MAX_ROLLBACKS` rollbacks; the values are then the last good.
        """
        config, of = self.config, self.config.max_train_steps
        bar = tqdm(
            total=of, initial=self.step, desc="training", unit="step", disable=not self.accelerator.is_main_process
        )
        started = time.perf_counter()
        stopped = False
        try:
            while self.step < of and not stopped:
                try:
                    done = self.make_step()
                except NotFinite as error:
                    self.roll_back(str(error))
                    bar.n = self.step
                    continue
                bar.update()
                bar.set_postfix(loss=f"{done.loss:.4f}")
                self.note(replace(done, seconds=round(time.perf_counter() - started, 3)))
                self.accelerator.log({"loss": done.loss, "learning_rate": done.learning_rate}, step=self.step)
                if self.watch is not None and (self.step % (config.validation_steps or 1) == 0 or self.step == of):
                    self.look(self.model.fixed_loss())
                if self.step % config.checkpointing_steps == 0 and self.step < of:
                    self.save()
                stopped = self.step < of and stop_asked()
                if on_step is not None:
                    stopped = bool(on_step(done)) or stopped
                stopped = self.on_any_process(stopped)
        finally:
            bar.close()
        return stopped

    def on_any_process(self, flag: bool) -> bool:
        """Whether one of the processes says so: they must leave the loop together, or some would wait for ever."""
        if self.accelerator.num_processes == 1:
            return flag
        votes = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return votes.item() > 0

    def make_step(self) -> Step:
        """One optimizer step over all micro-batches.

        Raises NotFinite for a loss or gradient that is not finite, and SVFitError where fp16's loss scaling has
        skipped `MAX_SKIPPED` steps in a row for that.
        """
        accelerator, config = self.accelerator, self.config
        rate = self.rate_factor * self.multiplier(self.step)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.between_steps = False
        losses, priors = [], []
        for micro in range(config.gradient_accumulation_steps):
            number = self.step * config.gradient_accumulation_steps + micro
            with accelerator.accumulate(*self.modules):
                loss = self.model.loss(number, accelerator.process_index, accelerator.num_processes)
                losses.append(accelerator.reduce(loss.instance.detach(), "mean").item())
                if loss.prior is not None:
                    priors.append(accelerator.reduce(loss.prior.detach(), "mean").item())
                total = accelerator.reduce(loss.total.detach(), "mean").item()
                self.check(math.isfinite(total), f"the loss is {total}")  # before it reaches the values
                accelerator.backward(loss.total)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(list(self.values.values()), config.max_grad_norm)
                    # with fp16 the loss scaling meets infinite gradients by design, and skips their step
                    if accelerator.scaler is None:
                        self.check(bool(torch.isfinite(norm)), f"the gradient's length is {norm}")
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.skipped = self.skipped + 1 if self.optimizer.step_was_skipped else 0
        if self.skipped == MAX_SKIPPED:  # no value has changed since, so there is nothing to return to
            raise SVFitError(
                f"the gradients of {MAX_SKIPPED} steps in a row, up to step {self.step + 1}, are not finite: "
                "lower learning_rate, or use mixed_precision no."
            )
        self.step += 1
        self.between_steps = True
        return Step(
            self.step,
            config.max_train_steps,
            sum(losses) / len(losses),
            config.learning_rate * rate,
            sum(priors) / len(priors) if priors else None,
        )

    def check(self, finite: bool, what: str) -> None:
        if not finite:
            raise NotFinite(f"{what} at step {self.step + 1}")

    def roll_back(self, reason: str) -> None:
        """Goes back to the last good state with half the learning rate.  Raises SVFitError after the last try."""
        factor, rollbacks = self.rate_factor / 2, self.rollbacks + 1
        self.go_to(self.good)
        if rollbacks > MAX_ROLLBACKS:
            raise SVFitError(
                f"{reason}, also after {MAX_ROLLBACKS} returns to step {self.step} with half the learning rate each: "
                "lower learning_rate, or use mixed_precision no."
            )
        self.rate_factor, self.rollbacks = factor, rollbacks
        rate = self.config.learning_rate * factor
        logger.warning("%s: back to step %d, learning rate now %g.", reason, self.step, rate)
        self.note(WentBack(self.step, reason, rate))

    def look(self, fixed_loss: float | None) -> None:
        """Paints and measures, and remembers the step if it is the best so far."""
        if self.watch is None:
            return
        if self.accelerator.is_main_process:
            measured = self.watch.look(self.step, fixed_loss)
            if self.folder.look(self.step).is_file():
                self.note(Painted(self.step, self.folder.look(self.step).relative_to(self.folder.path).as_posix()))
            self.note(measured)
            numbers = {name: value for name, value in asdict(measured).items() if name != "step" and value is not None}
            self.accelerator.log(numbers, step=self.step)
            points = score(measured)
            if self.step and points is not None and (self.best is None or points > self.best.score):
                self.best = Best(self.step, points, capture(self.values, self.raw_optimizer)[0])
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        """Makes this the last good state, in memory and on the disk.  A full disk is a warning, not the end."""
        self.good = self.state()
        if not self.accelerator.is_main_process:
            return
        try:
            path = save_checkpoint(
                self.good, self.folder.checkpoints, self.identity, self.config.checkpoints_total_limit
            )
        except (SVFitError, OSError) as error:
            logger.warning("no checkpoint of step %d: %s Training goes on.", self.step, error)
            return
        self.note(Saved(self.step, path.relative_to(self.folder.path).as_posix()))

    def note(self, event: Event) -> None:
        """A line of progress.jsonl, by the main process."""
        if self.accelerator.is_main_process:
            self.folder.note(event)


@contextmanager
def stop_signals(at_once: bool = False) -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C and SIGTERM let the present step end; a second one, or `at_once` the first, interrupts."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked or at_once:
            raise KeyboardInterrupt
        asked.append(number)
        logger.warning("stopping after this step; once more, and it stops at once.")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
