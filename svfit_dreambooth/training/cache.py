"""What is kept on this disk of bases so that it need not be computed again: one list of all kinds.

A file counts where both its place and what it holds are of one of the kinds below, or where it is damaged and in such
a place; whatever else somebody has put there is neither shown nor deleted.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from svfit_dreambooth import folders
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import cached_files
from svfit_dreambooth.training.kept import note_of

ANY_BASE = "any base with these weights"
UNKNOWN = "a base whose name was not noted"
DIGEST = re.compile(r"[0-9a-f]{64}")
PICTURE = re.compile(r"[0-9a-f]{32}\.safetensors")
SENSITIVITY = re.compile(r"[0-9a-f]{64}\.safetensors")


@dataclass(frozen=True)
class Cached:
    """A file that can be computed again."""

    path: Path
    kind: str
    size: int  # in bytes
    base: str  # what it was computed for


@dataclass(frozen=True)
class Summary:
    """All files of one kind and base."""

    kind: str
    base: str
    count: int
    size: int


def _directions(folder: Path) -> Iterator[Cached]:
    for path, size in cached_files(folder):
        yield Cached(path, "singular directions", size, ANY_BASE)


def _sensitivities(folder: Path) -> Iterator[Cached]:
    for path in sorted((folder / "sensitivity").glob("*.safetensors")):
        if SENSITIVITY.fullmatch(path.name):
            yield from _kept(path, "sensitivity")


def _pictures(folder: Path) -> Iterator[Cached]:
    for path in sorted((folder / "base_pictures").glob("*/*.safetensors")):
        if PICTURE.fullmatch(path.name) and DIGEST.fullmatch(path.parent.name):
            yield from _kept(path, "pictures of the base")


KINDS: tuple[Callable[[Path], Iterator[Cached]], ...] = (_directions, _sensitivities, _pictures)


def _kept(path: Path, kind: str) -> Iterator[Cached]:
    """The file, unless it is somebody else's, or has gone meanwhile."""
    note = note_of(path)
    if note is None or not path.exists():
        return
    try:
        base = str(json.loads(note)["base"])
    except (ValueError, TypeError, KeyError):  # damaged, or of a version that did not note it
        base = UNKNOWN
    yield Cached(path, kind, path.stat().st_size, base)


def cached(cache_dir: Path | None = None) -> list[Cached]:
    """All of it in `cache_dir`; None: `folders.cache_dir()`."""
    folder = cache_dir or folders.cache_dir()
    return [entry for kind in KINDS for entry in kind(folder)]


def summed(entries: Sequence[Cached]) -> list[Summary]:
    """Kind by kind, and of each kind base by base."""
    order = {kind: number for number, kind in enumerate(dict.fromkeys(entry.kind for entry in entries))}
    ordered = sorted(entries, key=lambda entry: (order[entry.kind], entry.base))
    groups = groupby(ordered, lambda entry: (entry.kind, entry.base))
    return [
        Summary(kind, base, len(own), sum(entry.size for entry in own))
        for (kind, base), own in ((key, list(group)) for key, group in groups)
    ]


def clear_cache(cache_dir: Path | None = None) -> list[Cached]:
    """Deletes all of it, and nothing else; returns what that was.  Folders of pictures that are empty then go too.

    A run that needs some of it computes that again.  Raises SVFitError for a file that cannot be deleted.
    """
    found = cached(cache_dir)
    for entry in found:
        try:
            entry.path.unlink(missing_ok=True)  # another process may clear at the same time
        except OSError as error:
            raise SVFitError(f"{entry.path} cannot be deleted ({error.strerror}): remove it by hand.") from error
    for folder in {entry.path.parent for entry in found if DIGEST.fullmatch(entry.path.parent.name)}:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    return found
