"""What a worker of a fleet does: it holds an opened base and trains subject after subject on it."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.one_of_several import Outcome
from svfit_dreambooth.training.plan import open_run_base
from svfit_dreambooth.training.together import as_stored, train_alone, train_together


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

    def __init__(self) -> None:
        self.base: BaseModel | None = None

    def train(self, configs: Sequence[TrainConfig]) -> list[Report]:
        """Trains the subjects of `configs`: one as its own command would, to the bit; several in one run."""
        started = time.perf_counter()
        if self.base is None:
            self.base = open_run_base(configs[0])
        try:
            outcomes = (
                [train_alone(configs[0], self.base)] if len(configs) == 1 else train_together(configs, base=self.base)
            )
        finally:
            self.base = as_stored(self.base, configs[0])
        return [_report(outcome, round(time.perf_counter() - started, 1)) for outcome in outcomes]

    def process(self) -> int:
        """The number of the worker's process."""
        return os.getpid()


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
