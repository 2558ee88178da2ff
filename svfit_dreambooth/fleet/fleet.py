"""A fleet: workers on this machine or on a cluster, each with an opened base, that take subject after subject.

Ray starts them and tells when one dies; all that must not be lost lies in the run folders of the subjects, which a
cluster's machines share.  A worker that dies is replaced, and its subjects go on from their checkpoints.

Who kills a worker cannot be asked: the system's own lack of memory ends it by the same signal as a stranger.  But what a
subject does to its workers happens at the same place of its run each time, and strangers kill anywhere.  So deaths are
counted that follow each other at one place; those before a worker has opened the base say nothing about a subject.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.fleet.cluster import Means, cluster, end_process, in_time, machines, room
from svfit_dreambooth.fleet.worker import Report, Worker
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.events import Phase, from_line
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.signals import stop_signals

logger = logging.getLogger(__name__)

MOST_LOSSES = (
    5  # of workers in a row that died at the same place of the same subjects, or, of each, at opening the base
)
MOST_SETBACKS = 20  # of workers in a row that died wherever it was, but no further than those before
STOP_SECONDS = 60.0  # in which workers that are told to end may save where they are
LOOK_SECONDS = 0.5  # between two looks at how far the subjects are
TAIL_BYTES = 4096  # of a diary: some lines

Place: TypeAlias = tuple[int, str]  # of a run: its step, and what it does where that is no step


@dataclass(eq=False)
class Turn:
    """Subjects that one worker trains at once, and what has become of its workers so far."""

    configs: list[TrainConfig]
    lost: int = 0  # workers, in all
    furthest: int = 0  # steps of all its subjects
    setbacks: int = 0  # workers in a row that were lost without getting further
    places: list[Place] = field(default_factory=list)  # of its subjects, when the last worker was lost
    at_places: int = 0  # workers in a row that were lost there

    def lose(self) -> None:
        """Counts a worker that was lost, by what the subjects' diaries tell of now."""
        places = [place_of(config) for config in self.configs]
        steps = sum(step for step, _ in places)
        self.lost += 1
        self.at_places = self.at_places + 1 if places == self.places else 1
        self.setbacks = self.setbacks + 1 if steps <= self.furthest else 1
        self.places, self.furthest = places, max(steps, self.furthest)


def place_of(config: TrainConfig) -> Place:
    """Where a subject's run is, by the end of its diary."""
    try:
        with open(RunFolder(config.output_dir, config.adapter_name).progress, "rb") as diary:
            diary.seek(max(0, diary.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = diary.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return 0, ""
    events = [event for event in map(from_line, lines) if event is not None]
    doing = events[-1].doing if events and isinstance(events[-1], Phase) else ""
    steps = [event.step for event in events if not isinstance(event, Phase)]  # what comes after the steps names none
    return steps[-1] if steps else 0, doing


def steps_made(config: TrainConfig) -> int:
    """How far a subject has come."""
    return place_of(config)[0]


def run_fleet(
    configs: Sequence[TrainConfig],
    means: Means,
    on_report: Callable[[Report], None] = lambda report: None,
    on_look: Callable[[Sequence[TrainConfig]], None] = lambda under_way: None,
) -> list[Report]:
    """Trains all subjects; `on_report` hears of each when it is done, `on_look` twice a second of those under way.

    Subjects go on from their checkpoints; those that are finished are left as they are.  Ctrl-C, SIGTERM and SIGHUP
    have every worker save what it has learnt, as in a single run, within `STOP_SECONDS`; a second one ends all at once.
    Raises SVFitError without Ray, for a cluster that is not there, for workers that none of its machines has room for,
    and where workers cannot open the base.
    """
    configs = [replace(config, resume_from_checkpoint="latest") for config in configs]
    waiting = deque(Turn(list(configs[i : i + means.at_once])) for i in range(0, len(configs), means.at_once))
    if not waiting:
        return []
    with cluster(means.address, means.startup_seconds) as ray, stop_signals() as asked:
        fleet = Fleet(ray, means, waiting, on_report)
        try:
            while fleet.step():
                on_look([config for _, turn in fleet.busy.values() for config in turn.configs])
                if asked():
                    fleet.stop()
        except SVFitError:  # the others' work is not lost by it
            fleet.stop()
            raise
        finally:
            fleet.dismiss()
    return fleet.reports


class Fleet:
    """Workers, what they are at, and what is still to be done."""

    def __init__(self, ray: Any, means: Means, waiting: deque[Turn], on_report: Callable[[Report], None]) -> None:
        self.ray, self.waiting, self.on_report = ray, waiting, on_report
        self.count, resources = in_time(lambda: room(machines(ray), means, len(waiting)), means.startup_seconds)
        self.kind = ray.remote(**resources, max_restarts=0)(Worker)
        self.opening: dict[Any, Any] = {}  # what will answer -> who opens the base
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, Turn]] = {}  # what will answer -> who is at what
        self.processes: dict[Any, tuple[str, int]] = {}  # of workers: machine and number
        self.unopened = 0  # workers in a row that died before they had opened the base
        self.stopping = False
        self.reports: list[Report] = []

    def step(self) -> bool:
        """Gives every worker something to do, and hears those that are done; whether anything is left."""
        while self.waiting and self.idle:
            worker, turn = self.idle.pop(), self.waiting.popleft()
            self.busy[worker.train.remote(turn.configs)] = (worker, turn)
        while len(self.opening) < min(len(self.waiting), self.count - len(self.busy)):
            worker = self.kind.remote()
            self.opening[worker.open.remote(self.waiting[0].configs[0])] = worker
        self._wait([*self.opening, *self.busy], LOOK_SECONDS)
        return bool(self.waiting or self.busy)

    def stop(self) -> None:
        """Has every worker save where it is; what is not finished is told of as stopped."""
        self.stopping = True
        for turn in self.waiting:
            self._tell_all(turn, "stopped", "not begun." if turn.lost == 0 else None)
        self.waiting.clear()
        for worker, _ in self.busy.values():
            with suppress(ProcessLookupError):
                end_process(self.ray, *self.processes[worker])
        until = time.monotonic() + STOP_SECONDS
        while self.busy and (left := until - time.monotonic()) > 0:
            self._wait(list(self.busy), left)
        late = f"not saved within {STOP_SECONDS:g} s: it goes on from its last checkpoint."
        for worker, turn in self.busy.values():
            self.ray.kill(worker)
            self._tell_all(turn, "stopped", late)
        self.busy.clear()

    def dismiss(self) -> None:
        """Ends all workers."""
        for worker in [*self.opening.values(), *self.idle, *(worker for worker, _ in self.busy.values())]:
            self.ray.kill(worker)

    def _wait(self, answers: list[Any], seconds: float) -> None:
        done, _ = self.ray.wait(answers, timeout=seconds) if answers else ([], [])
        for answer in done:
            if answer in self.opening:
                self._hear_opened(answer, self.opening.pop(answer))
            else:
                self._hear(answer, *self.busy.pop(answer))

    def _hear_opened(self, answer: Any, worker: Any) -> None:
        """Raises SVFitError where the base cannot be opened, or workers always die of it."""
        errors = self.ray.exceptions
        try:
            self.processes[worker] = self.ray.get(answer)
        except errors.RayTaskError as error:
            if isinstance(error.cause, SVFitError):
                raise error.cause from None
            raise SVFitError(f"a worker cannot open the base: {named(error.cause)}.") from None
        except errors.RayError as error:
            self.ray.kill(worker)
            self.unopened += 1
            if self.unopened >= MOST_LOSSES * self.count:
                raise SVFitError(
                    f"no worker has opened the base, {self.unopened} in a row {self._end_of(error)}: give each more memory, "
                    "or ask for fewer workers.",
                    "workers",
                ) from None
            logger.warning("a worker died before it had opened the base: another is started.")
        else:
            self.unopened = 0
            self.idle.append(worker)

    def _hear(self, answer: Any, worker: Any, turn: Turn) -> None:
        errors = self.ray.exceptions
        try:
            reports = self.ray.get(answer)
        except errors.RayTaskError as error:  # nothing that we know of: the worker is not trusted any more
            self.ray.kill(worker)
            self._tell_all(turn, "failed", f"{named(error.cause)}.")
            return
        except errors.RayError as error:
            self.ray.kill(worker)  # it may only be out of reach
            self._lost(turn, self._end_of(error))
            return
        stopped = [] if self.stopping else [report.subject for report in reports if report.state == "stopped"]
        for report in reports:
            if report.subject not in stopped:
                self._tell(replace(report, workers_lost=turn.lost))
        if stopped:  # somebody told the worker to end
            self.ray.kill(worker)
            turn.configs = [config for config in turn.configs if config.adapter_name in stopped]
            self._lost(turn, "were told to end")
        else:
            self.idle.append(worker)

    def _end_of(self, error: Exception) -> str:
        """What happened to a worker, as far as Ray knows."""
        of_memory = isinstance(error, self.ray.exceptions.OutOfMemoryError)
        return "ran out of memory" if of_memory else "were killed or crashed"

    def _lost(self, turn: Turn, why: str) -> None:
        """Puts the subjects of a worker that died back in front, unless it is always they that workers die of."""
        turn.lose()
        names = ", ".join(str(config.adapter_name) for config in turn.configs)
        if self.stopping:
            self._tell_all(turn, "stopped", "its worker died: it goes on from its last checkpoint.")
        elif turn.at_places >= MOST_LOSSES:
            self._tell_all(
                turn,
                "failed",
                f"{turn.at_places} workers in a row {why} at it after step {turn.furthest}: give workers more memory, or "
                "use mixed_precision bf16, a smaller train_batch_size or gradient_checkpointing.",
            )
        elif turn.setbacks >= MOST_SETBACKS:
            self._tell_all(
                turn,
                "failed",
                f"{turn.setbacks} workers in a row {why} at it without getting beyond step {turn.furthest}: find out what "
                "ends them, or save more often with a smaller checkpointing_steps.",
            )
        else:
            logger.warning("a worker died at %s: another goes on from their checkpoints.", names)
            self.waiting.appendleft(turn)

    def _tell_all(self, turn: Turn, state: str, message: str | None) -> None:
        for config in turn.configs:
            self._tell(
                Report(str(config.adapter_name), state, config.output_dir, message=message, workers_lost=turn.lost)
            )

    def _tell(self, report: Report) -> None:
        self.reports.append(report)
        self.on_report(report)


def named(error: BaseException) -> str:
    """The kind of an error, and what it says in the end, without a full stop."""
    said = (str(error).strip().splitlines() or ["no word"])[-1].strip().rstrip(".")
    return f"{type(error).__name__}: {said}"
