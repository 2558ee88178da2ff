"""Ray: a cluster that is there or one of this machine's own, and how many workers it has room for."""

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from svfit_dreambooth.errors import SVFitError

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
    startup_seconds: float = 0  # in which a cluster may still come up, and get room for the workers that are asked for


def machines(ray: Any) -> list[dict[str, float]]:
    """What each machine of a cluster has, in Ray's words."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(there: Sequence[dict[str, float]], means: Means, turns: int) -> tuple[int, dict[str, float]]:
    """How many workers, and what Ray gives to each of them, of what is `there` on each machine.

    A worker is on one machine.  Raises SVFitError where there is no room for one.
    """
    cpus = [int(machine.get("CPU", 0)) for machine in there]
    gpus = [machine.get("GPU", 0.0) for machine in there]
    own_gpus = means.gpus_per_worker if means.gpus_per_worker is not None else min(1.0, max(gpus))
    if own_gpus > max(gpus):
        raise SVFitError(
            f"gpus_per_worker is {own_gpus:g}, and there are {max(gpus):g} GPUs{' on a machine' * (len(there) > 1)}: give "
            "less.",
            "gpus_per_worker",
        )
    if (means.cpus_per_worker or 1) > max(cpus):
        raise SVFitError(
            f"cpus_per_worker is {means.cpus_per_worker}, and there are {max(cpus)}{' on a machine' * (len(there) > 1)}: "
            "give less.",
            "cpus_per_worker",
        )

    def places(own_cpus: int) -> int:
        """For how many workers there is room, of so many CPUs each."""
        by_gpus = [int(each / own_gpus + 1e-9) for each in gpus] if own_gpus else cpus
        return sum(min(each // own_cpus, most) for each, most in zip(cpus, by_gpus, strict=True))

    most = places(means.cpus_per_worker or 1)
    asked = means.workers if means.workers is not None else most if own_gpus or means.cpus_per_worker else 1
    if max(asked, 1) > most:
        raise SVFitError(f"workers is {asked}, and there is room for {most}: give fewer, or less to each.", "workers")
    count = min(asked, turns)
    own_cpus = means.cpus_per_worker or max(each for each in range(1, max(cpus) + 1) if places(each) >= count)
    return count, {"num_cpus": own_cpus, "num_gpus": own_gpus}


def in_time(ask: Callable[[], Any], seconds: float) -> Any:
    """What `ask` returns, which is tried once a second while it raises SVFitError, for so long."""
    until = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except SVFitError:
            if time.monotonic() >= until:
                raise
        time.sleep(min(1.0, seconds))


@contextmanager
def cluster(address: str | None, startup_seconds: float = 0) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or, None, to one on this machine that ends with the block.

    Raises SVFitError where there is none, nor comes up within `startup_seconds`.
    """
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
                in_time(partial(check_there, address), startup_seconds)
                _connect(ray, address)
            yield ray
        finally:
            ray.shutdown()


def _start(ray: Any, folder: str) -> None:
    """Starts Ray on this machine; `folder`: for its files.  A machine under load may need more than the time it gives."""
    for attempt in range(START_ATTEMPTS):
        own = os.path.join(folder, str(attempt))
        try:
            ray.init(
                address="local",
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                _temp_dir=own,
                **QUIETLY,
            )
            return
        except Exception as error:  # Ray raises nothing narrower
            ray.shutdown()
            _end_rest(own)
            if "timed out" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise SVFitError(f"Ray does not start on this machine: {' '.join(str(error).split())[:200]}") from error


def _end_rest(folder: str) -> None:
    """Ends what a start that failed has left behind: Ray itself does so only when this program ends."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if any(folder in part for part in process.cmdline()):
                process.kill()


def _connect(ray: Any, address: str) -> None:
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
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise SVFitError(NOT_THERE.format(address, getattr(error, "strerror", None) or error), "address") from None


def end_process(ray: Any, node: str, process: int) -> None:
    """Sends SIGTERM to a process of another of the cluster's machines, or of this one."""
    if node == ray.get_runtime_context().get_node_id():
        os.kill(process, signal.SIGTERM)
        return
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    ray.remote(num_cpus=0, scheduling_strategy=there)(lambda: os.kill(process, signal.SIGTERM)).remote()
