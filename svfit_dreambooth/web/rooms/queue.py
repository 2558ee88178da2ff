"""The queue of training runs: one at a time on each device, everybody in turn, each in a process of its own."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable

from filelock import FileLock, Timeout

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.job import Job, changing
from svfit_dreambooth.web.rooms.jobs import Jobs
from svfit_dreambooth.web.rooms.launch import devices, launch
from svfit_dreambooth.web.rooms.processes import created_at, working_on
from svfit_dreambooth.web.rooms.workspace import empty_served

TICK = 0.5  # seconds between looks
DAY = 24 * 3600.0  # seconds
AGAIN = 60.0  # seconds after which what went wrong with a job is tried again


class Queue:
    """Starts the runs of `jobs` in turn and files what they leave.

    `offline`: tells of a base model whether the run that opens it may ask no network.  `make_room`: is called before
    a run starts on the device on which the page paints.
    """

    def __init__(
        self,
        jobs: Jobs,
        offline: Callable[[str], bool] = lambda base: False,
        make_room: Callable[[], None] = lambda: None,
    ):
        self.jobs = jobs
        self.offline = offline
        self.make_room = make_room
        self._children: list[subprocess.Popen[bytes]] = []
        self._cleans = 0.0  # monotonic time at which it is cleaned up next
        self._rests: dict[str, float] = {}  # id of a job that went wrong -> monotonic time from which it is tried again

    def start(self) -> None:
        """Lets a thread tend it from now on."""
        self.jobs.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._serve, name="training queue", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                self.tend()
            except (OSError, SVFitError, ValueError) as error:
                print(f"warning: the queue of training runs: {error}", file=sys.stderr)
            time.sleep(TICK)

    def tend(self) -> None:
        """Starts what can start, files the results of what has ended in the library, and once a day cleans up."""
        if time.monotonic() >= self._cleans:
            self._cleans = time.monotonic() + DAY
            self.jobs.empty_trash()
            empty_served(self.jobs.workspace)
        self._children = [child for child in self._children if child.poll() is None]
        try:
            with FileLock(self.jobs.folder / ".queue", timeout=0):
                for job in self.jobs.all():
                    if job.filed < job.started and not self.jobs.is_alive(job):
                        self._try(self._file, job)
                for job in self.jobs.in_turn():
                    self._try(self._start, job)
        except Timeout:
            return  # another server on this folder is at it

    def _try(self, act: Callable[[Job], None], job: Job) -> None:
        """Does it; the others in line wait neither for a full disk nor for a broken file, and it comes again later."""
        if time.monotonic() < self._rests.get(job.id, 0.0):
            return
        try:
            act(job)
        except (OSError, SVFitError, ValueError, RuntimeError) as error:
            self._rests[job.id] = time.monotonic() + AGAIN
            print(f"warning: the run of {job.name}, tried again in {AGAIN:.0f} s: {error}", file=sys.stderr)

    def _start(self, job: Job) -> None:
        """Starts a run, unless no device is free."""
        places = devices()
        taken = {other.device for other in self.jobs.all() if self.jobs.is_alive(other)}
        device = next((place for place in places if place not in taken), None)
        if device is None or self.jobs.is_alive(job):  # of one that was just stopped, and is to go on
            return
        folder = self.jobs.folder / job.id
        with changing(folder) as now:
            if not now.waits:
                return  # stopped a moment ago
            pid = working_on(folder / "job.yaml")
            if pid is None:
                if device == places[0]:
                    self.make_room()
                child = launch(folder, device, resume=now.started > 0, offline=self.offline(job.base))
                self._children.append(child)
                pid = child.pid
            now.pid, now.process_created, now.device = pid, created_at(pid), device
            now.started, now.started_at, now.stopping = now.started + 1, time.time(), False

    def _file(self, job: Job) -> None:
        """The adapter that a run has left, into its owner's library."""
        jobs = self.jobs
        adapter, name, sha256 = jobs.adapter(job), job.library_name, job.library_sha256
        if adapter.is_file():
            name, sha256 = jobs.put_in_library(job, adapter)
        ended = jobs.ended(job)
        with changing(jobs.folder / job.id) as changed:
            changed.library_name, changed.library_sha256, changed.library_step = name, sha256, None
            changed.filed, changed.ended = changed.started, ended
