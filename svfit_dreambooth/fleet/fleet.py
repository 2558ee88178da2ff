"""A fleet: workers on this machine or on a cluster, each with an opened base, that take subject after subject.

Ray starts them and tells when one dies; all that must not be lost lies in the run folders of the subjects, which a
cluster's machines share.  A worker that dies is replaced, and its subjects go on from their checkpoints.
"""

import logging
import os
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.fleet.worker import Report, Worker
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.events import from_line
from svfit_dreambooth.training.journal import RunFolder

logger = logging.getLogger(__name__)

MOST_LOSSES = 5  # of workers in a row that died at the same subjects without a step beyond those made before
LOOK_SECONDS = 0.5  # between two looks at how far the subjects are
TAIL_BYTES = 4096  # of a diary: some lines
OBJECT_STORE_BYTES = 80_000_000  # Ray's least, as next to nothing goes through it
START_ATTEMPTS = 3
QUIETLY: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
NOT_THERE = (
    "no Ray cluster answers at address {} ({}): start one with `ray start --head`, or leave address out for this machine "
    "alone."
)


@dataclass(frozen=True)
class Means:
    """What a fleet is run with."""

    workers: int | None = None  # None: as many as there is room for
    gpus_per_worker: float | None = None  # None: 1 where there are GPUs
    cpus_per_worker: int | None = None  # threads of each; None: those that there are, shared out evenly
    address: str | None = None  # of a Ray cluster; None: this machine alone
    at_once: int = 1  # subjects in one run


@dataclass(eq=False)
class Turn:
    """Subjects that one worker trains at once, and what has become of its workers so far."""

    configs: list[TrainConfig]
    lost: int = 0  # workers, in all
    in_a_row: int = 0  # of them without getting further
    furthest: int = 0  # steps of all its subjects

    def steps(self) -> int:
        """Those that the subjects' diaries tell of now."""
        return sum(steps_made(config) for config in self.configs)


def steps_made(config: TrainConfig) -> int:
    """How far a subject has come, by the end of its diary."""
    try:
        with open(RunFolder(config.output_dir, config.adapter_name).progress, "rb") as diary:
            diary.seek(max(0, diary.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = diary.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return 0
    return next((event.step for event in map(from_line, reversed(lines)) if event is not None), 0)


def run_fleet(
    configs: Sequence[TrainConfig],
    means: Means,
    on_report: Callable[[Report], None] = lambda report: None,
    on_look: Callable[[Sequence[TrainConfig]], None] = lambda under_way: None,
) -> list[Report]:
    """Trains all subjects; `on_report` hears of each when it is done, `on_look` twice a second of those under way.

    Subjects go on from their checkpoints; those that are finished are left as they are.  Raises SVFitError without
    Ray, for a cluster that is not there, and for workers that none of its machines has room for.
    """
    configs = [replace(config, resume_from_checkpoint="latest") for config in configs]
    waiting = deque(Turn(list(configs[i : i + means.at_once])) for i in range(0, len(configs), means.at_once))
    if not waiting:
        return []
    with cluster(means.address) as ray:
        fleet = Fleet(ray, means, waiting, on_report)
        try:
            while fleet.step():
                on_look([config for _, turn in fleet.busy.values() for config in turn.configs])
        finally:
            fleet.dismiss()
    return fleet.reports


class Fleet:
    """Workers, what they are at, and what is still to be done."""

    def __init__(self, ray: Any, means: Means, waiting: deque[Turn], on_report: Callable[[Report], None]) -> None:
        self.ray, self.waiting, self.on_report = ray, waiting, on_report
        self.count, resources = room(ray.cluster_resources(), means, len(waiting))
        self.kind = ray.remote(**resources, max_restarts=0)(Worker)
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, Turn]] = {}  # what will answer -> who is at what
        self.reports: list[Report] = []

    def step(self) -> bool:
        """Gives every worker something to do, and hears those that are done; whether anything is left."""
        while self.waiting and (self.idle or len(self.busy) < self.count):
            worker = self.idle.pop() if self.idle else self.kind.remote()
            turn = self.waiting.popleft()
            self.busy[worker.train.remote(turn.configs)] = (worker, turn)
        done, _ = self.ray.wait(list(self.busy), timeout=LOOK_SECONDS) if self.busy else ([], [])
        for answer in done:
            self._hear(answer, *self.busy.pop(answer))
        return bool(self.waiting or self.busy)

    def dismiss(self) -> None:
        """Ends all workers."""
        for worker in [*self.idle, *(worker for worker, _ in self.busy.values())]:
            self.ray.kill(worker)

    def _hear(self, answer: Any, worker: Any, turn: Turn) -> None:
        errors = self.ray.exceptions
        try:
            reports = self.ray.get(answer)
        except (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError) as error:
            of_memory = isinstance(error, errors.OutOfMemoryError)
            self._lost(turn, "ran out of memory" if of_memory else f"died ({last_line(error)})")
            return
        except errors.RayTaskError as error:  # nothing that we know of: the worker is not trusted any more
            self.ray.kill(worker)
            reports = failed(turn.configs, f"{type(error.cause).__name__}: {last_line(error.cause)}")
        else:
            self.idle.append(worker)
        for report in reports:
            self._tell(replace(report, workers_lost=turn.lost))

    def _lost(self, turn: Turn, why: str) -> None:
        """Puts the subjects of a worker that died back in front, unless it is always they that workers die of."""
        steps = turn.steps()
        turn.in_a_row = 1 if steps > turn.furthest else turn.in_a_row + 1
        turn.furthest, turn.lost = max(steps, turn.furthest), turn.lost + 1
        names = ", ".join(str(config.adapter_name) for config in turn.configs)
        if turn.in_a_row < MOST_LOSSES:
            logger.warning("a worker died at %s: another goes on from their checkpoints.", names)
            self.waiting.appendleft(turn)
            return
        for report in failed(
            turn.configs,
            f"{MOST_LOSSES} workers in a row {why} at it without getting beyond step {turn.furthest}: give workers more "
            "memory, or use mixed_precision bf16, a smaller train_batch_size or gradient_checkpointing.",
        ):
            self._tell(replace(report, workers_lost=turn.lost))

    def _tell(self, report: Report) -> None:
        self.reports.append(report)
        self.on_report(report)


def last_line(error: BaseException) -> str:
    """What an error says in the end; Ray's begin with where it was."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")


def failed(configs: Sequence[TrainConfig], message: str) -> list[Report]:
    """Reports of subjects that came to nothing."""
    return [Report(str(config.adapter_name), "failed", config.output_dir, message=message) for config in configs]


def room(there: dict[str, float], means: Means, turns: int) -> tuple[int, dict[str, float]]:
    """How many workers, and what Ray gives to each of them, of the resources that are `there`.

    Raises SVFitError where there is no room for one.
    """
    cpus, gpus = int(there.get("CPU", 0)), there.get("GPU", 0.0)
    own_gpus = means.gpus_per_worker if means.gpus_per_worker is not None else min(1.0, gpus)
    if own_gpus > gpus:
        raise SVFitError(f"gpus_per_worker is {own_gpus:g}, and there are {gpus:g} GPUs: give less.", "gpus_per_worker")
    if (means.cpus_per_worker or 1) > cpus:
        raise SVFitError(
            f"cpus_per_worker is {means.cpus_per_worker}, and there are {cpus}: give less.", "cpus_per_worker"
        )
    most = cpus // (means.cpus_per_worker or 1)
    if own_gpus:
        most = min(most, int(gpus / own_gpus + 1e-9))
    asked = means.workers if means.workers is not None else most if own_gpus or means.cpus_per_worker else 1
    if asked > most:
        raise SVFitError(f"workers is {asked}, and there is room for {most}: give fewer, or less to each.", "workers")
    count = min(asked, turns)
    return count, {"num_cpus": means.cpus_per_worker or max(1, cpus // count), "num_gpus": own_gpus}


@contextmanager
def cluster(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or, None, to one on this machine that ends with the block."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody else is told of what runs here
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would let training wait for whatever else runs
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise SVFitError("a fleet needs Ray: `pip install svfit-dreambooth[fleet]`.") from None
    with tempfile.TemporaryDirectory(prefix="svfit-ray-", ignore_cleanup_errors=True) as folder:
        try:
            if address is None:
                _start(ray, folder)
            else:
                _connect(ray, address)
            yield ray
        finally:
            ray.shutdown()


def _start(ray: Any, folder: str) -> None:
    """Starts Ray on this machine; `folder`: for its files.  A machine under load may need more than the time it gives."""
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                _temp_dir=os.path.join(folder, str(attempt)),
                **QUIETLY,
            )
            return
        except Exception as error:  # Ray raises nothing narrower
            ray.shutdown()
            if "timed out" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise SVFitError(f"Ray does not start on this machine: {' '.join(str(error).split())[:200]}") from error


def _connect(ray: Any, address: str) -> None:
    check_there(address)
    try:
        ray.init(address=address, **QUIETLY)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SVFitError(NOT_THERE.format(address, " ".join(str(error).split())[:200]), "address") from None


def check_there(address: str) -> None:
    """Raises SVFitError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdecimal():
        return  # "auto": Ray knows
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise SVFitError(NOT_THERE.format(address, error.strerror or error), "address") from None
