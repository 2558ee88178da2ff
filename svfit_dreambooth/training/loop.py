"""The way of a run from step to step: falling back from bad numbers, looks, checkpoints, its end."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypeAlias

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.checkpoints import Best, Checkpoints, TrainState
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.ending import Ending
from svfit_dreambooth.training.events import Event, Painted, Phase, Saved, Stepped, WentBack
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.keep_base import KeptBase
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.optimizer import Steps
from svfit_dreambooth.training.signals import stop_signals
from svfit_dreambooth.training.stepping import NotFinite, Stepping
from svfit_dreambooth.training.trainable import copies, put_back
from svfit_dreambooth.training.watch import CLEARLY, Watch, doubt, look_steps, score

logger = logging.getLogger(__name__)

MAX_ROLLBACKS = 3

Step = Stepped  # what `on_step` is told after every optimizer step
OnStep: TypeAlias = Callable[[Stepped], bool | None]


class Loop(Stepping):
    """Where a run stands: the values it trains, their optimizer, the last good state, the best one so far."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        objective: Objective,
        modules: Sequence[nn.Module],
        values: Mapping[str, nn.Parameter],
        steps: Steps,
        folder: RunFolder,
        checkpoints: Checkpoints | None = None,
        watch: Watch | None = None,
        positions: Mapping[str, Tensor] | None = None,
        kept_base: KeptBase | None = None,
    ) -> None:
        """`values`: what is trained, by name; `steps`: how far they move; `modules`: what they belong to.

        `folder`: where the main process notes what happens.  `checkpoints`: None writes none.  `watch`: None paints and
        measures nothing on the way.  `positions`: of the values, for the checkpoints.  `kept_base`: None lets the rest go where it goes.
        """
        super().__init__(config, accelerator, objective, modules, values, steps, kept_base)
        self.folder, self.checkpoints, self.watch = folder, checkpoints, watch
        self.positions = None if positions is None else dict(positions)
        self.rollbacks, self.worse = 0, 0
        self.best: Best | None = None
        self.enough = False  # looks say so
        self.good = self.state()

    def state(self) -> TrainState:
        """A copy of where the run stands."""
        scaler = {} if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()
        return TrainState(
            self.step, copies(self.values), self.optimizer.memory(), self.rate_factor, self.rollbacks, self.best,
            scaler, self.positions, self.worse, self.steps,
        )  # fmt: skip

    def go_to(self, state: TrainState) -> None:
        """Puts the run where `state` stood."""
        put_back(self.values, state.values)
        self.optimizer.restore(state.optimizer)
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        self.accelerator.step = 0  # it counts micro-batches, and may have been left in the middle of a step
        self.step, self.rate_factor, self.rollbacks = state.step, state.rate_factor, state.rollbacks
        self.best = None if self.watch is None else state.best  # nothing would be compared with it
        self.worse = 0 if self.best is None else state.worse
        self.enough = self.is_enough()
        self.good, self.between_steps, self.skipped = state, True, 0

    def complete(self, on_step: OnStep | None, resumed: TrainState | None = None) -> Ending:
        """Makes all steps, from `resumed` on; saves the last, and leaves the values of the step that is kept."""
        loss_before = self.begin(resumed)
        started, first = time.perf_counter(), self.step
        stopped, hurried, failure = self.run(on_step)
        seconds = time.perf_counter() - started
        if self.step > first and failure is None:
            self.save()
        return self.end(Ending(self.step, self.step, seconds, loss_before, None, stopped, hurried, failure))

    def begin(self, resumed: TrainState | None) -> float | None:
        """Looks at the run before its first step, or goes to where it is `resumed`; the loss of the base."""
        loss_before = self.objective.fixed_loss()
        if resumed is None:
            self.look(loss_before)
        else:
            self.go_to(resumed)
        self.phase("training")
        return loss_before

    def end(self, ending: Ending) -> Ending:
        """Leaves the values of the step that is kept, and measures them: `ending` with what that gave."""
        if ending.failure is not None:
            return ending
        kept = self.step
        if self.best is not None and self.config.keep == "best" and not ending.stopped:
            kept = self.best.step
            put_back(self.values, self.best.values)
        return replace(ending, kept=kept, loss_after=self.objective.fixed_loss())

    def run(self, on_step: OnStep | None = None) -> tuple[bool, bool, SVFitError | None]:
        """Makes the steps that are left.

        Returns whether it was stopped before the last one, by `on_step` or a signal; whether a signal came at all; and
        what it failed from, after `MAX_ROLLBACKS` returns to the last good state.
        """
        with stop_signals() as asked:
            try:
                return self._steps(on_step, asked), asked(), None
            except KeyboardInterrupt:
                if not self.between_steps:
                    self.go_to(self.good)
                return self.step < self.config.max_train_steps, True, None
            except SVFitError as error:
                return False, asked(), error

    def _steps(self, on_step: OnStep | None, stop_asked: Callable[[], bool]) -> bool:
        of, started, stopped = self.config.max_train_steps, time.perf_counter(), False
        main = self.accelerator.is_main_process
        with tqdm(total=of, initial=self.step, desc="training", unit="step", disable=not main) as bar:
            while self.step < of and not stopped and not self.enough:
                try:
                    done = replace(self.make_step(), seconds=round(time.perf_counter() - started, 3))
                except NotFinite as error:
                    self.roll_back(str(error))
                    bar.n = self.step
                    continue
                bar.update()
                bar.set_postfix(loss=f"{done.loss:.4f}")
                self.after(done)
                stopped = self.step < of and stop_asked()
                if on_step is not None:
                    stopped = bool(on_step(done)) or stopped
                stopped = self.on_any_process(stopped)
        return stopped

    def after(self, done: Stepped) -> None:
        """Notes a step, looks at the run and saves it where that is due."""
        config, last = self.config, self.step == self.config.max_train_steps
        self.note(done)
        self.accelerator.log({"loss": done.loss, "learning_rate": done.learning_rate}, step=self.step)
        if self.watch is not None and self.step in look_steps(config):
            self.look(self.objective.fixed_loss())
        if self.step % config.checkpointing_steps == 0 and not last:
            self.save()

    def on_any_process(self, flag: bool) -> bool:
        """Whether one of the processes says so: they must leave the loop together, or some would wait for ever."""
        if self.accelerator.num_processes == 1:
            return flag
        votes = self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum")
        return votes.item() > 0

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
        rate = self.steps.learning_rate * factor
        logger.warning("%s: back to step %d, learning rate now %g.", reason, self.step, rate)
        self.note(WentBack(self.step, reason, rate))

    def look(self, fixed_loss: float | None) -> None:
        """Paints and measures, and remembers the step if it is the best so far."""
        if self.watch is None:
            return
        if self.accelerator.is_main_process:
            self.phase("looking")
            measured = self.watch.look(self.step, fixed_loss)
            if self.folder.look(self.step).is_file():
                self.note(Painted(self.step, self.folder.relative(self.folder.look(self.step))))
            self.note(measured)
            numbers = {name: value for name, value in asdict(measured).items() if name != "step" and value is not None}
            self.accelerator.log(numbers, step=self.step)
            points = score(measured)
            if self.step and points is not None:
                self.compare(points, doubt(measured))
            self.phase("training")
        self.accelerator.wait_for_everyone()
        self.enough = self.on_any_process(self.is_enough())  # the main process alone has looked
        if self.enough and self.best is not None and self.accelerator.is_main_process:
            logger.info(
                "%d looks in a row are clearly worse than that of step %d: the run ends at step %d of %d; patience 0 makes "
                "all of them.", self.worse, self.best.step, self.step, self.config.max_train_steps,
                extra={"parameters": ("patience",)},
            )  # fmt: skip

    def is_enough(self) -> bool:
        """Whether the looks say that the run gets no better."""
        return bool(self.config.patience) and self.worse >= self.config.patience

    def compare(self, points: float, doubt: float) -> None:
        """Remembers this step if it is the best so far, or as good; counts the looks in a row that were clearly worse.

        Of looks whose scores say nothing of each other, the later has learnt more.
        """
        highest = points if self.best is None else max(points, self.best.score)
        if self.best is None or points > self.best.score - doubt:
            self.best = Best(self.step, highest, copies(self.values))
        self.worse = self.worse + 1 if points < self.best.score - CLEARLY else 0

    def save(self) -> None:
        """Makes this the last good state, in memory and on the disk.  A full disk is a warning, not the end."""
        self.good = self.state()
        if self.checkpoints is None or not self.accelerator.is_main_process:
            return
        try:
            path = self.checkpoints.save(self.good)
        except (SVFitError, OSError) as error:
            logger.warning("no checkpoint of step %d: %s Training goes on.", self.step, error)
            return
        self.note(Saved(self.step, self.folder.relative(path)))

    def phase(self, doing: str) -> None:
        self.note(Phase(doing, time.time(), self.step))

    def note(self, event: Event) -> None:
        """A line of progress.jsonl, by the main process."""
        if self.accelerator.is_main_process:
            self.folder.note(event)
