"""One training run as it was asked for: `job.json` in a folder of its own, read and changed across servers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically


@dataclass
class Job:
    """A run as it was asked for; how far it is stands in its folder."""

    id: str
    name: str  # of the adapter
    owner: str  # "" on a computer's own page
    base: str
    instance_prompt: str
    created: float  # unix seconds
    person: str = ""  # whom limits meet: an account or a network; "" on a computer's own page
    digest: str = ""  # of options and photos: equal for a run that is asked for twice
    asked: int = 1  # times that it was to start: once, and once more for every resuming
    asked_at: float = 0.0
    started: int = 0
    started_at: float = 0.0
    stopping: bool = False
    pid: int | None = None
    process_created: float | None = None  # unix seconds
    device: str | None = None  # on which it was last started
    filed: int = 0  # the start whose result is in the library
    ended: str | None = None  # the state in which that start left the run
    library_name: str | None = None
    library_sha256: str | None = None  # of that file: another one may have taken its name since
    library_step: int | None = None  # the look whose values it holds by a person's choice; None: the run's own
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        return self.asked > self.started


def read_job(folder: Path) -> Job | None:
    """The job in `folder`; None where it was just removed, or is none of ours."""
    try:
        return Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def changing(folder: Path) -> Iterator[Job]:
    """The job as it stands, written back afterwards; one at a time, across servers."""
    if not (folder / "job.json").is_file():
        raise SVFitError("there is no such run any more: reload the page.")
    with FileLock(folder / ".change"):
        job = Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
        yield job
        write_atomically(folder / "job.json", json.dumps(asdict(job)))
