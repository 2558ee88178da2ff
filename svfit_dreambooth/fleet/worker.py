"""What a worker of a fleet does: it holds an opened base and trains subject after subject on it."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.subjects.subject import Outcome
from svfit_dreambooth.subjects.together import as_stored, train_alone, train_together
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.plan import open_run_base
from svfit_dreambooth.training.result import plain_memory_errors
from svfit_dreambooth.training.signals import stop_signals


@dataclass(frozen=True)
class Report:
    """What became of one subject of a fleet."""

    subject: str
    state: str  # as in `Outcome`
    folder: str
    adapter: str | None = None
    message: str | None = None  # why it failed, one sentence
    steps: int | None = None
    kept_step: int | None = None
    seconds: float | None = None  # since its worker turned to it the last time
    workers_lost: int = 0  # that died while they were at it

    def line(self) -> dict[str, Any]:
        """What is known of it, as a JSON object."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Worker:
    """Trains what it is told to; the base stays open from one subject to the next."""

    base: BaseModel
    used = False  # whether the base has been trained on

    def open(self, config: TrainConfig) -> tuple[str, int]:
        """Opens the base of `config`; says which process of which machine this is.

        Raises SVFitError for a base that cannot be opened.
        """
        with plain_memory_errors():
            self.base = open_run_base(config)
        return whereabouts()

    def train(self, configs: Sequence[TrainConfig]) -> list[Report]:
        """Trains the subjects of `configs`: one as its own command would, to the bit; several in one run.

        SIGTERM ends it as it ends a single run: what was learnt is saved, and the subjects are "stopped".
        """
        started = time.perf_counter()
        try:
            with stop_signals(at_once=True):
                if self.used:
                    self.base = as_stored(self.base, configs[0])
                self.used = True
                outcomes = (
                    [train_alone(configs[0], self.base)]
                    if len(configs) == 1
                    else train_together(configs, base=self.base)
                )
        except KeyboardInterrupt:  # between what may be saved
            return [Report(str(config.adapter_name), "stopped", config.output_dir) for config in configs]
        return [_report(outcome, round(time.perf_counter() - started, 1)) for outcome in outcomes]


def whereabouts() -> tuple[str, int]:
    """Ray's name for the machine, and the number of the process."""
    import ray

    return ray.get_runtime_context().get_node_id(), os.getpid()


def _report(outcome: Outcome, seconds: float) -> Report:
    result = outcome.result
    return Report(
        outcome.name,
        outcome.state,
        str(outcome.folder),
        None if outcome.adapter is None else str(outcome.adapter),
        outcome.message,
        None if result is None else result.steps,
        None if result is None else result.kept_step,
        seconds,
    )
