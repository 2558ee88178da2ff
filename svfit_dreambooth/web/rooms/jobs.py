"""A queue of training runs, each the training command in a process of its own, with a folder of its own.

The folder is all there is: `job.json` (what was asked for), `job.yaml` (the options), `photos/`, `run/` (what the run
writes, see run_folder.py), `log.txt`.  Whether a run is alive is told by a lock on `.process` that its process
inherits and the system releases when it ends, however it ends; a lock per device lets one run at a time have it.  So
the page may be closed and the server restarted: whoever looks at the folders knows as much as before.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.events import End, Start
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.job import Job, changing, read_job
from svfit_dreambooth.web.rooms.laid_out import photo_files
from svfit_dreambooth.web.rooms.launch import complaint, devices, launch, log_end
from svfit_dreambooth.web.rooms.locks import is_locked, locked
from svfit_dreambooth.web.rooms.workspace import Visitor, Workspace, empty_served, file_name, library_of

TICK = 1.0  # seconds between looks at the queue
DAY = 24 * 3600.0  # seconds
AGAIN = 60.0  # seconds after which what went wrong with a job is tried again
MAX_QUEUED = 20  # runs of one owner that may wait


class Jobs:
    """The runs of a workspace.  `start_queue` lets a thread start them in turn; without it they only wait.

    `offline`: tells of a base model whether the run that opens it may ask no network.  `make_room`: is called before
    a run starts on the device on which the page paints.
    """

    def __init__(
        self,
        workspace: Workspace,
        offline: Callable[[str], bool] = lambda base: False,
        make_room: Callable[[], None] = lambda: None,
    ):
        self.workspace = workspace
        self.offline = offline
        self.make_room = make_room
        self.folder = workspace.jobs
        self._children: list[subprocess.Popen[bytes]] = []
        self._wake = threading.Event()
        self._cleans = 0.0  # monotonic time at which it is cleaned up next
        self._rests: dict[str, float] = {}  # id of a job that went wrong -> monotonic time from which it is tried again

    def start_queue(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._serve_queue, name="training queue", daemon=True).start()

    def submit(self, visitor: Visitor, name: str, options: dict[str, Any], photos_folder: Path | None = None) -> Job:
        """A new run at the end of the queue, with the photos that the visitor has laid out or those of `photos_folder`.

        `options`: those of TrainConfig, without the folder of the run, and of the photos unless others are to be taken
        than those.  Raises SVFitError for options that no run could use.
        """
        name = file_name(name, "name of the adapter")
        photos = [] if "instance_data_dir" in options else photo_files(photos_folder or visitor.photos)
        if not photos and "instance_data_dir" not in options:
            raise SVFitError("there are no photos yet: add 3 to 10 of your subject.")
        if not str(options.get("instance_prompt") or "").strip():
            raise SVFitError('say what the photos show, such as "a photo of sks dog".')
        waiting = [job for job in self.listed(visitor) if self.state(job) == "queued"]
        if len(waiting) >= MAX_QUEUED:
            raise SVFitError(f"{len(waiting)} runs are waiting already: let some finish first.")
        now, id = time.time(), f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = self.folder / id
        options = {
            "instance_data_dir": str(folder / "photos"),
            **options,
            "output_dir": str(folder / "run"),
            "adapter_name": name,
        }
        TrainConfig(**options)  # refuses in a sentence
        base = str(options["pretrained_model_name_or_path"])
        job = Job(id, name, visitor.owner, base, options["instance_prompt"], now, asked_at=now, options=options)
        temporary = self.folder / f".new-{id}"
        (temporary / "photos").mkdir(parents=True)
        (temporary / "run").mkdir()
        for photo in photos:
            shutil.copyfile(photo, temporary / "photos" / photo.name)
        (temporary / "job.yaml").write_text(yaml.safe_dump(options, sort_keys=False, allow_unicode=True), "utf-8")
        (temporary / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        temporary.rename(folder)
        self._wake.set()
        return job

    def listed(self, visitor: Visitor) -> list[Job]:
        """The visitor's runs, newest first."""
        return [job for job in self._all() if job.owner == visitor.owner]

    def find(self, visitor: Visitor, id: str) -> Job:
        """One of the visitor's runs.  Raises SVFitError for any other word."""
        for job in self.listed(visitor):
            if job.id == id:
                return job
        raise SVFitError("there is no such run any more: reload the page.")

    def state(self, job: Job) -> str:
        """queued, running, stopping, finished, stopped, failed, or cut off (killed without a word), as of now."""
        job = read_job(self.folder / job.id) or job
        if self._alive(job):
            return "stopping" if job.stopping else "running"
        if job.asked > job.started:
            return "queued"
        if job.started == 0:
            return "stopped"
        return job.ended if job.ended and job.filed == job.started else self._ended(job)

    def _ended(self, job: Job) -> str:
        """The state in which the last start left a run, told from its files."""
        if self.complaint(job):
            return "failed"
        turns = [event for event in RunFolder(self.run_folder(job)).events() if isinstance(event, Start | End)]
        if turns and isinstance(turns[-1], End):
            return turns[-1].status
        return "stopped" if job.stopping else "cut off"

    def ahead(self, job: Job) -> int:
        """How many runs, of anybody, are before a queued one."""
        return sum(
            self._alive(other) or (other.asked > other.started and other.asked_at < job.asked_at)
            for other in self._all()
            if other.id != job.id
        )

    def run_folder(self, job: Job) -> Path:
        return self.folder / job.id / "run"

    def result(self, job: Job) -> Path | None:
        """The adapter that a run has put into the library; None if it is not there any more, whatever has its name."""
        if job.library_name is None:
            return None
        path = library_of(self.workspace, job.owner) / f"{job.library_name}{library.SUFFIX}"
        return path if path.is_file() and library.sha256(path) == job.library_sha256 else None

    def complaint(self, job: Job) -> str:
        """The sentence with which the command gave up, "" if there is none."""
        return complaint(self.log(job))

    def log(self, job: Job) -> str:
        """The end of what the command printed."""
        return log_end(self.folder / job.id / "log.txt")

    def stop(self, job: Job) -> None:
        """A running one saves what it has learnt and ends; a waiting one leaves the queue."""
        with changing(self.folder / job.id) as now:
            now.asked = now.started
            if self._alive(now) and now.pid:
                now.stopping = True
                with suppress(ProcessLookupError):
                    os.kill(now.pid, signal.SIGTERM)

    def resume(self, job: Job) -> None:
        """Puts a run that was stopped, failed or cut off at the end of the queue, to go on where it was."""
        with changing(self.folder / job.id) as now:
            if self._alive(now) or now.asked > now.started:
                raise SVFitError(f"{now.name} is running or waiting already.")
            now.asked, now.asked_at, now.stopping = now.started + 1, time.time(), False
        self._wake.set()

    def remove(self, job: Job) -> None:
        """Puts the folder of a run that is over aside; what it has put into the library stays."""
        if self.state(job) in ("running", "stopping"):
            raise SVFitError(f"{job.name} is running: stop it first.")
        trash = self.folder / library.TRASH
        trash.mkdir(exist_ok=True)
        (self.folder / job.id).rename(trash / job.id)
        os.utime(trash / job.id)  # from now on it is kept for a while

    def restore(self, visitor: Visitor, id: str) -> None:
        """Brings back a run that the visitor removed.  Raises SVFitError for any other word."""
        for path in (self.folder / library.TRASH).glob("[0-9]*/job.json"):
            job = read_job(path.parent)
            if path.parent.name == id and job is not None and job.owner == visitor.owner:
                path.parent.rename(self.folder / id)
                return
        raise SVFitError("that run is gone for good: it was removed too long ago, or brought back already.")

    def empty_trash(self) -> None:
        """Removes for good the runs and adapters, of all visitors, that were put aside more than 30 days ago."""
        libraries = self.workspace.folder.glob("visitors/*/adapters")
        for folder in (self.folder, library_of(self.workspace, ""), *libraries):
            library.empty_trash(folder)

    # ------------------------------------------------------------ the queue

    def tend(self) -> None:
        """Starts what can start, files the results of what has ended in the library, and once a day cleans up."""
        if time.monotonic() >= self._cleans:
            self._cleans = time.monotonic() + DAY
            self.empty_trash()
            empty_served(self.workspace)
        self._children = [child for child in self._children if child.poll() is None]
        with locked(self.folder / ".queue") as held:
            if held is None:
                return  # another server on this folder is at it
            jobs = self._all()
            for job in jobs:
                if job.filed < job.started and not self._alive(job):
                    self._try(self._file, job)
            for job in sorted(jobs, key=lambda job: job.asked_at):
                if job.asked > job.started:
                    self._try(self._start, job)

    def _try(self, act: Callable[[Job], None], job: Job) -> None:
        """Does it; the others in line wait neither for a full disk nor for a broken file, and it comes again later."""
        if time.monotonic() < self._rests.get(job.id, 0.0):
            return
        try:
            act(job)
        except (OSError, SVFitError, ValueError, RuntimeError) as error:
            self._rests[job.id] = time.monotonic() + AGAIN
            print(f"warning: the run of {job.name}, tried again in {AGAIN:.0f} s: {error}", file=sys.stderr)

    def _serve_queue(self) -> None:
        while True:
            try:
                self.tend()
            except (OSError, SVFitError, ValueError) as error:
                print(f"warning: the queue of training runs: {error}", file=sys.stderr)
            self._wake.wait(TICK)
            self._wake.clear()

    def _start(self, job: Job) -> None:
        folder = self.folder / job.id
        places = devices()
        for device in places:
            with locked(self.folder / f".device-{device}") as device_lock, locked(folder / ".process") as own_lock:
                if device_lock is None or own_lock is None:
                    continue
                with changing(self.folder / job.id) as now:
                    if now.asked <= now.started:
                        return  # stopped a moment ago
                    if device == places[0]:
                        self.make_room()
                    held, offline = (device_lock, own_lock), self.offline(job.base)
                    child = launch(folder, device, held, resume=now.started > 0, offline=offline)
                    now.pid, now.started, now.stopping = child.pid, now.started + 1, False
                self._children.append(child)
                return

    def _file(self, job: Job) -> None:
        """The adapter that a run has left, into its owner's library."""
        adapter, earlier = self.run_folder(job) / f"{job.name}.safetensors", self.result(job)
        folder = library_of(self.workspace, job.owner)
        name, sha256 = job.library_name, job.library_sha256
        if adapter.is_file():
            if earlier is not None:
                name = earlier.stem
                library.replace(folder, name, adapter)
            else:
                name = library.add(folder, adapter)
            sha256 = library.sha256(folder / f"{name}{library.SUFFIX}")
        ended = self._ended(job)
        with changing(self.folder / job.id) as changed:
            changed.library_name, changed.library_sha256 = name, sha256
            changed.filed, changed.ended = changed.started, ended

    def _all(self) -> list[Job]:
        jobs = [job for path in self.folder.glob("[0-9]*/job.json") if (job := read_job(path.parent)) is not None]
        return sorted(jobs, key=lambda job: (job.created, job.id), reverse=True)

    def _alive(self, job: Job) -> bool:
        return is_locked(self.folder / job.id / ".process")
