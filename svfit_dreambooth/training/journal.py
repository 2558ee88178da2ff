"""The folder of one training run: who may write in it, what has happened in it, and what an earlier run left.

`progress.jsonl` has one JSON object a line, `event` first; other programs follow a run by reading it.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically

LOCK = ".lock"
PROGRESS = "progress.jsonl"
EARLIER = "earlier"


@contextmanager
def lock_run(folder: str | Path) -> Iterator[None]:
    """Within it no other run writes into `folder`.  The lock is the system's (flock) and dies with its process.

    Raises SVFitError where another run holds it, and where the folder cannot be written.
    """
    folder = Path(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise SVFitError(f"another run is writing into {folder}: wait for it, or choose another output_dir.") from None
    except OSError as error:
        raise SVFitError(f"output_dir {folder} cannot be written ({error.strerror}): choose another folder.") from error
    try:
        yield
    finally:
        lock.release()


def append_progress(folder: str | Path, event: str, **values: Any) -> None:
    """Adds one line to the folder's progress.jsonl."""
    line = json.dumps({"event": event, **values}, ensure_ascii=False)
    with open(Path(folder) / PROGRESS, "a", encoding="utf-8") as lines:
        lines.write(line + "\n")


def read_progress(folder: str | Path) -> list[dict[str, Any]]:
    """The events of the run in `folder`, oldest first; a line that a killed run left unfinished is left out."""
    try:
        text = (Path(folder) / PROGRESS).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def rewind_progress(folder: str | Path, step: int) -> None:
    """Takes the events after `step` out of progress.jsonl: a run that goes on from there makes them again."""
    kept = [event for event in read_progress(folder) if event.get("step", 0) <= step and event["event"] != "end"]
    lines = [json.dumps(event, ensure_ascii=False) + "\n" for event in kept]
    write_atomically(Path(folder) / PROGRESS, "".join(lines))


def set_aside(folder: str | Path, adapter_name: str, keep: str | Path | None = None) -> Path | None:
    """Moves what an earlier run left in `folder` to <folder>/earlier/NNN, so that nothing is overwritten.

    Only what a run wrote is moved, and, whoever wrote it, what the run of `adapter_name` would overwrite.  `keep`: a
    file that this run still reads; it is copied instead.  Returns where it all lies now; None where there was nothing.
    """
    folder = Path(folder)
    names = ["config.yaml", "curve.png", *_result_names(adapter_name)]
    if (folder / PROGRESS).exists():
        names += [PROGRESS, "checkpoints", "validation", "validation.png", "logs"]
        for event in read_progress(folder):
            if event["event"] == "start" and isinstance(event.get("adapter_name"), str):
                names += _result_names(Path(event["adapter_name"]).name)
    found = [path for path in (folder / name for name in dict.fromkeys(names)) if path.exists()]
    if not found:
        return None
    number = 1
    while (target := folder / EARLIER / f"{number:03d}").exists():
        number += 1
    target.mkdir(parents=True)
    for path in found:
        if keep is not None and path.resolve() == Path(keep).resolve():
            shutil.copy2(path, target / path.name)
        else:
            path.rename(target / path.name)
    return target


def _result_names(adapter_name: str) -> list[str]:
    """The files that a run of `adapter_name` may leave beside the fixed ones."""
    endings = (".safetensors", ".png", "-kohya.safetensors", "-diffusers.safetensors")
    return [adapter_name + ending for ending in endings]
