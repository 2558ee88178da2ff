"""A folder of adapter files: listed, renamed, imported, and deleted with a way back.

An adapter `dog.safetensors` may have a picture `dog.png` beside it.  Names come from a person or a browser, so none
is ever joined to a path: it is looked up among the files that are there.
"""

import functools
import hashlib
import json
import os
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import file_name, save_png, write_atomically
from svfit_dreambooth.web.rooms.workspace import MAX_ADAPTER_BYTES, place

if TYPE_CHECKING:  # the page opens before torch is imported
    from svfit_dreambooth.adapter.file import Adapter

SUFFIX = ".safetensors"
TRASH = ".deleted"
KEPT_SECONDS = 30 * 24 * 3600  # for which what was deleted can come back


@dataclass
class Entry:
    """One adapter of the library."""

    name: str
    path: Path
    picture: Path | None
    description: dict[str, Any]  # as describe_adapter tells it
    date: float  # unix seconds

    @property
    def instance_prompt(self) -> str:
        return self.description["instance_prompt"] or ""

    @property
    def base_model(self) -> str:
        return self.description["base_model"]


def names(folder: Path) -> list[str]:
    """Names of the adapters in `folder`, newest first."""
    paths = [path for path in folder.glob(f"*{SUFFIX}") if not path.name.startswith(".")]
    return [path.stem for path in sorted(paths, key=lambda path: (-path.stat().st_mtime, path.name))]


def find(folder: Path, name: str) -> Path:
    """The file of the adapter `name`.  Raises SVFitError if there is none."""
    if name not in names(folder):
        raise SVFitError(f"there is no adapter called {name!r} in the library: reload the page.")
    return folder / f"{name}{SUFFIX}"


def sha256(path: Path) -> str:
    """By which a file is known again, whatever it is called."""
    stat = path.stat()
    return _sha256(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=10_000)
def _sha256(path: Path, mtime: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_content(folder: Path, content: str) -> Path | None:
    """The adapter in `folder` whose `sha256` that is; None if there is none."""
    for name in names(folder):
        path = folder / f"{name}{SUFFIX}"
        with suppress(FileNotFoundError):  # renamed just now
            if sha256(path) == content:
                return path
    return None


def entries(folder: Path) -> tuple[list[Entry], list[tuple[str, str]]]:
    """All adapters, newest first; then the name of each file that is none, and what is wrong with it."""
    found, broken = [], []
    for name in names(folder):
        try:
            found.append(entry(folder, name))
        except (SVFitError, OSError) as error:
            broken.append((name, str(error).replace(f"{folder}{os.sep}", "")))
    return found, broken


def entry(folder: Path, name: str) -> Entry:
    """The adapter `name`, read and checked."""
    path = find(folder, name)
    picture = folder / f"{name}.png"
    stat = path.stat()
    description = _describe(str(path), stat.st_mtime_ns, stat.st_size)
    return Entry(name, path, picture if picture.is_file() else None, description, stat.st_mtime)


_described: dict[tuple[str, int, int], dict[str, Any]] = {}


def _describe(path: str, mtime: int, size: int) -> dict[str, Any]:
    from svfit_dreambooth.adapter.describe import describe_adapter
    from svfit_dreambooth.adapter.file import read_adapter

    key = (path, mtime, size)
    if key not in _described:
        if len(_described) > 1000:
            _described.clear()
        try:
            _described[key] = describe_adapter(read_adapter(path), path)
        except (SVFitError, OSError):
            raise
        except Exception as error:
            raise SVFitError(
                f"{path} cannot be read as an adapter ({type(error).__name__}: {error}): delete it."
            ) from error
    return _described[key]


def check_upload(upload: Path) -> "Adapter":
    """The adapter in an uploaded file.  Raises SVFitError, naming the file without its folder."""
    from svfit_dreambooth.adapter.file import read_adapter

    if upload.stat().st_size > MAX_ADAPTER_BYTES:
        raise SVFitError(f"{upload.name!r} is larger than {MAX_ADAPTER_BYTES >> 20} MB, which no adapter is.")
    try:
        return read_adapter(upload)
    except SVFitError as error:
        raise SVFitError(str(error).replace(str(upload), upload.name)) from None


def add(folder: Path, source: Path, picture: Path | None = None, name: str | None = None) -> str:
    """Copies an adapter file, checked, into the library; returns its name there: `name` or a free one like it.

    Without `picture`, the one that the file carries stands for it, if there is one.
    """
    adapter = check_upload(source)
    chosen = _put(folder, source, file_name(name or source.stem))
    if picture is not None:
        set_picture(folder, chosen, picture)
    else:
        _take_thumbnail(adapter, folder / f"{chosen}.png")
    return chosen


def replace(folder: Path, name: str, source: Path) -> None:
    """Puts a newer file in the place of the adapter `name`; a picture that stands for it stays."""
    adapter = check_upload(source)
    path = find(folder, name)
    write_atomically(path, source.read_bytes())
    if not (shown := folder / f"{name}.png").exists():
        _take_thumbnail(adapter, shown)


def set_picture(folder: Path, name: str, picture: Path) -> None:
    """Copies `picture`, a PNG file, as the one that stands for the adapter `name`."""
    find(folder, name)
    write_atomically(folder / f"{name}.png", picture.read_bytes())


def _take_thumbnail(adapter: "Adapter", target: Path) -> None:
    """Writes the picture that an adapter file carries, if it does, as `target`: pixels alone, whatever it was."""
    from svfit_dreambooth.adapter.describe import read_thumbnail

    picture = read_thumbnail(adapter.metadata)
    if picture is not None:
        save_png(picture, target)


def _put(folder: Path, source: Path, wanted: str) -> str:
    """Copies `source` into the library under the name `wanted`, or a free one like it, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    number, chosen = 1, wanted
    while not _place(source, folder / f"{chosen}{SUFFIX}"):
        number += 1
        chosen = f"{wanted}-{number}"
    return chosen


def _place(source: Path, target: Path) -> bool:
    """A whole copy of `source` at `target`, unless something is there already (also in other letter case)."""
    if target.name.casefold() in {path.name.casefold() for path in target.parent.iterdir()}:
        return False
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        shutil.copyfile(source, temporary)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return place(temporary, target)  # never over a file that came meanwhile


def rename(folder: Path, name: str, new_name: str) -> str:
    """Gives the adapter `name` another name; returns it as it is spelled now."""
    find(folder, name)
    new_name = file_name(new_name)
    if new_name == name:
        return name
    taken = {other.casefold() for other in names(folder) if other != name}
    if new_name.casefold() in taken:
        raise SVFitError(f"there is an adapter called {new_name!r} already: choose another name.")
    for suffix in (SUFFIX, ".png"):
        if (old := folder / f"{name}{suffix}").is_file():
            old.rename(folder / f"{new_name}{suffix}")
    return new_name


def delete(folder: Path, name: str) -> str:
    """Takes the adapter out of the library; returns what `restore` needs to bring it back."""
    path = find(folder, name)
    token = f"{time.time_ns()}-{secrets.token_hex(4)}"
    trash = folder / TRASH / token
    trash.mkdir(parents=True)
    for file in (path, folder / f"{name}.png"):
        if file.is_file():
            file.rename(trash / file.name)
    (trash / "deleted.json").write_text(json.dumps({"name": name}), encoding="utf-8")
    return token


def restore(folder: Path, token: str) -> str:
    """Brings back a deleted adapter; returns its name, a free one if its own was taken meanwhile."""
    places = {path.name: path for path in (folder / TRASH).glob("*-*")}
    if token not in places:
        raise SVFitError("that adapter is gone for good: it was deleted too long ago, or brought back already.")
    trash = places[token]
    name = json.loads((trash / "deleted.json").read_text(encoding="utf-8"))["name"]
    picture = trash / f"{name}.png"
    path = trash / f"{name}{SUFFIX}"
    date = path.stat().st_mtime
    restored = _put(folder, path, name)  # unchecked: what was broken comes back too
    if picture.is_file():
        set_picture(folder, restored, picture)
    os.utime(folder / f"{restored}{SUFFIX}", (date, date))
    shutil.rmtree(trash)
    return restored


def empty_trash(folder: Path) -> None:
    """Removes for good what was put into the trash of `folder`, adapters or runs, more than 30 days ago."""
    for trash in (folder / TRASH).glob("*-*"):
        with suppress(OSError):  # brought back meanwhile, or in the way of another server
            if time.time() - trash.stat().st_mtime > KEPT_SECONDS:
                shutil.rmtree(trash)
