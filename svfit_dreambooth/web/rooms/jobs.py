"""Training runs: asked for, stopped, resumed, removed; each with a folder of its own.

The folder is all there is: `job.json` (what was asked for), `job.yaml` (the options), `photos/`, `picture.png`, `run/` (what
the run writes, see training/journal.py), `log.txt`.  Whether a run is alive is told by its process.  So the page may be closed
and the server restarted: whoever looks at the folders knows as much as before.  queue.py starts what waits.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import file_name
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.events import End, Start
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.job import Job, changing, read_job
from svfit_dreambooth.web.rooms.laid_out import caption, caption_file, photo_files, save_thumbnail
from svfit_dreambooth.web.rooms.launch import complaint, log_end
from svfit_dreambooth.web.rooms.processes import ask_to_stop, is_running
from svfit_dreambooth.web.rooms.turns import in_turn
from svfit_dreambooth.web.rooms.workspace import Visitor, Workspace, library_of

PICTURE = "picture.png"  # of the first photo, small
MAX_QUEUED = 20  # runs that may wait on a computer's own page
MAX_QUEUED_EACH = 5  # of one person, where strangers share it
MAX_QUEUED_ALL = 60


class Jobs:
    """The runs of a workspace."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self.folder = workspace.jobs

    def submit(self, visitor: Visitor, name: str, options: dict[str, Any], photos_folder: Path | None = None) -> Job:
        """A new run at the end of the queue, with the photos that the visitor has laid out or those of `photos_folder`.

        `options`: those of TrainConfig, without the folder of the run, and of the photos unless others are to be taken
        than those.  A run that waits or works already, with the same options on the same photos, is not made twice: it
        is returned.  Raises SVFitError for options that no run could use, and where too many wait.
        """
        name = file_name(name, "name of the adapter")
        photos = [] if "instance_data_dir" in options else photo_files(photos_folder or visitor.photos)
        if not photos and "instance_data_dir" not in options:
            raise SVFitError("there are no photos yet: add 3 to 10 of your subject.")
        if not str(options.get("instance_prompt") or "").strip():
            raise SVFitError('say what the photos show, such as "a photo of sks dog".')
        now, id = time.time(), f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        folder = self.folder / id
        digest = _digest(name, options, photos)
        options = {
            "instance_data_dir": str(folder / "photos"),
            **options,
            "output_dir": str(folder / "run"),
            "adapter_name": name,
        }
        TrainConfig(**options)  # refuses in a sentence
        base = str(options["pretrained_model_name_or_path"])
        job = Job(
            id, name, visitor.owner, base, options["instance_prompt"], now, visitor.person, digest,
            asked_at=now, options=options,
        )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".submit"):  # several may press at once, also several times
            if same := self._twin(job):
                return same
            self._check_room(visitor)
            self._write(job, photos)
        return job

    def _twin(self, job: Job) -> Job | None:
        """The run of the same owner that waits or works on just this already."""
        for other in self.all():
            if (other.owner, other.digest) == (job.owner, job.digest) and self.state(other) in ("queued", "running"):
                return other
        return None

    def _check_room(self, visitor: Visitor) -> None:
        waiting = [job for job in self.all() if job.waits]
        mine = sum(job.person == visitor.person for job in waiting)
        if mine >= (MAX_QUEUED if self.workspace.shared else MAX_QUEUED_EACH):
            raise SVFitError(f"{mine} of your runs are waiting already: let some finish first.")
        if len(waiting) >= MAX_QUEUED_ALL:
            raise SVFitError(f"{len(waiting)} runs are waiting already: try again when some have finished.")

    def _write(self, job: Job, photos: list[Path]) -> None:
        """The folder of a new run, whole or not at all."""
        temporary = self.folder / f".new-{job.id}"
        (temporary / "photos").mkdir(parents=True)
        (temporary / "run").mkdir()
        for photo in photos:
            for file in (photo, caption_file(photo)):
                if file.is_file():
                    shutil.copyfile(file, temporary / "photos" / file.name)
        shown = photos or sorted(Path(str(job.options["instance_data_dir"])).glob("*.png"))
        if shown:
            save_thumbnail(shown[0], temporary / PICTURE)
        text = yaml.safe_dump(job.options, sort_keys=False, allow_unicode=True)
        (temporary / "job.yaml").write_text(text, encoding="utf-8")
        (temporary / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
        temporary.rename(self.folder / job.id)

    def listed(self, visitor: Visitor) -> list[Job]:
        """The visitor's runs, newest first."""
        return [job for job in self.all() if job.owner == visitor.owner]

    def find(self, visitor: Visitor, id: str) -> Job:
        """One of the visitor's runs.  Raises SVFitError for any other word."""
        for job in self.listed(visitor):
            if job.id == id:
                return job
        raise SVFitError("there is no such run any more: reload the page.")

    def state(self, job: Job) -> str:
        """queued, running, stopping, finished, stopped, failed, or cut off (killed without a word), as of now."""
        job = read_job(self.folder / job.id) or job
        if self.is_alive(job):
            return "stopping" if job.stopping else "running"
        if job.waits:
            return "queued"
        if job.started == 0:
            return "stopped"
        return job.ended if job.ended and job.filed == job.started else self.ended(job)

    def ended(self, job: Job) -> str:
        """The state in which the last start left a run, told from its files."""
        if self.complaint(job):
            return "failed"
        turns = [event for event in RunFolder(self.run_folder(job)).events() if isinstance(event, Start | End)]
        if turns and isinstance(turns[-1], End):
            return turns[-1].status
        return "stopped" if job.stopping else "cut off"

    def ahead(self, job: Job) -> int:
        """How many runs, of anybody, are before a queued one."""
        line = [other.id for other in self.in_turn()]
        working = sum(self.is_alive(other) for other in self.all())
        return working + (line.index(job.id) if job.id in line else 0)

    def run_folder(self, job: Job) -> Path:
        return self.folder / job.id / "run"

    def picture(self, job: Job) -> Path | None:
        """A small one of its first photo; None for runs of earlier versions."""
        path = self.folder / job.id / PICTURE
        return path if path.is_file() else None

    def take_step(self, job: Job, step: int) -> None:
        """Makes the adapter as it was at the look of `step` the run's adapter in the library.

        What the run itself left stays in its folder, and comes back with the step that it kept.  Raises SVFitError
        while the run is not over, which would replace it, and for a step without a look.
        """
        state, end = self.state(job), [e for e in RunFolder(self.run_folder(job)).events() if isinstance(e, End)]
        if state in ("queued", "running", "stopping"):
            raise SVFitError(f"{job.name} is {state}: its looks can be used when it is over.")
        own = bool(end) and end[-1].kept_step == step
        source = self.adapter(job) if own else RunFolder(self.run_folder(job)).look_adapter(step)
        if not source.is_file():
            raise SVFitError(f"{job.name} kept no values of step {step}: choose another look.")
        name, sha256 = self.put_in_library(job, source)
        with changing(self.folder / job.id) as now:
            now.library_name, now.library_sha256, now.library_step = name, sha256, None if own else step

    def adapter(self, job: Job) -> Path:
        """What the run itself leaves."""
        return self.run_folder(job) / f"{job.name}.safetensors"

    def put_in_library(self, job: Job, source: Path) -> tuple[str, str]:
        """Makes the file `source` the run's adapter in its owner's library; returns its name there and its sha256."""
        folder, earlier = library_of(self.workspace, job.owner), self.result(job)
        if earlier is not None:
            name = earlier.stem
            library.replace(folder, name, source)
        else:
            name = library.add(folder, source, name=job.name)
        return name, library.sha256(folder / f"{name}{library.SUFFIX}")

    def result(self, job: Job) -> Path | None:
        """The adapter that a run has put into the library, whatever it is called now; None if it is not there any more."""
        if job.library_sha256 is None:
            return None
        return library.find_content(library_of(self.workspace, job.owner), job.library_sha256)

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
            if self.is_alive(now) and now.pid:
                now.stopping = True
                ask_to_stop(now.pid)

    def resume(self, job: Job) -> None:
        """Puts a run that was stopped, failed or cut off at the end of the queue, to go on where it was."""
        with changing(self.folder / job.id) as now:
            if self.is_alive(now) or now.waits:
                raise SVFitError(f"{now.name} is running or waiting already.")
            now.asked, now.asked_at, now.stopping = now.started + 1, time.time(), False

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

    def all(self) -> list[Job]:
        """The runs of everybody, newest first."""
        jobs = [job for path in self.folder.glob("[0-9]*/job.json") if (job := read_job(path.parent)) is not None]
        return sorted(jobs, key=lambda job: (job.created, job.id), reverse=True)

    def in_turn(self) -> list[Job]:
        """The waiting runs of everybody, in the order in which they will start."""
        jobs = self.all()
        served: dict[str, float] = {}
        for job in jobs:
            if job.started:
                served[job.person] = max(job.started_at, served.get(job.person, 0.0))
        waiting = [job for job in jobs if job.waits]
        return in_turn(waiting, lambda job: job.person, lambda job: job.asked_at, served)

    def is_alive(self, job: Job) -> bool:
        """Is the process of a run there?"""
        return job.filed < job.started and is_running(job.pid, job.process_created, self.folder / job.id / "job.yaml")


def _digest(name: str, options: dict[str, Any], photos: list[Path]) -> str:
    """By which a run that is asked for twice is known again."""
    digest = hashlib.sha256(json.dumps([name, options], sort_keys=True, default=str).encode())
    for photo in photos:
        digest.update(library.sha256(photo).encode() + caption(photo).encode())
    return digest.hexdigest()
