"""Captions: what other programs' files and folder names say of the photos.

photo.txt or photo.caption beside photo.jpg (also photo.jpg.txt, also .TXT) holds one caption or, line by line,
several; metadata.jsonl and metadata.csv are the tables of `datasets`' ImageFolder; a folder named "10_sks dog", as
kohya's scripts want it, holds photos of "sks dog" that are shown ten times as often as those of "1_sks dog".
"""

import csv
import io
import json
import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from svfit_dreambooth.errors import SVFitError

logger = logging.getLogger("svfit_dreambooth")

SUFFIXES = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "prompt")  # of a table, the first that it has

ORDERS = 8  # of the tags of a caption: they are encoded once and then reused, as windows of photos are

Captions = tuple[str, ...]  # alternatives of one photo, one of which is drawn each time; none: the instance prompt


def read_captions(photo: Path, entries: Mapping[str, Path], table: Mapping[str, Captions]) -> Captions:
    """The captions of `photo` from a file beside it, else from the `table` of its folder.

    `entries`: the folder's files by their names in small letters.  Raises SVFitError for a file that isn't UTF-8 text.
    """
    names = [f"{stem.lower()}{suffix}" for suffix in SUFFIXES for stem in (photo.stem, photo.name)]
    found = {path: lines for name in names if (path := entries.get(name)) and (lines := _lines(path))}
    if tabled := table.get(photo.name):
        found[photo.parent / "metadata"] = tabled
    if not found:
        return ()
    first, *others = found
    if any(found[other] != found[first] for other in others):
        logger.warning(
            "'%s' has different captions: those of %s are used, not those of %s.",
            photo.name,
            first.name,
            ", ".join(other.name for other in others),
        )
    return found[first]


def read_table(folder: Path) -> dict[str, Captions]:
    """File name -> captions from metadata.jsonl or metadata.csv; empty without one.

    A table whose columns hold no captions is named in a logged warning.  Raises SVFitError for one that can't be read.
    """
    for path in (folder / name for name in TABLES):
        if not path.is_file():
            continue
        rows = _rows(path)
        column = next((name for name in COLUMNS if any(name in row for row in rows)), None)
        if column is None:
            columns = ", ".join(dict.fromkeys(str(key) for row in rows for key in row)) or "none"
            logger.warning(
                "'%s' has no column %s (its columns: %s): no captions are read from it.",
                path,
                " or ".join(repr(name) for name in COLUMNS),
                columns,
            )
            return {}
        return {str(row["file_name"]): _captions(row.get(column), path) for row in rows if row.get("file_name")}
    return {}


def folder_words(folder: Path) -> tuple[int, str] | None:
    """How often the photos of a folder named "10_sks dog" count, and what they show; None for other names."""
    match = re.fullmatch(r"(\d{1,6})_(.*\S.*)", folder.resolve().name)
    return (int(match[1]), match[2].strip()) if match and int(match[1]) > 0 else None


def shuffled(caption: str, keep_tokens: int, seed: int) -> list[str]:
    """Up to ORDERS different orders of the tags of `caption`, its parts between commas; the first `keep_tokens` stay."""
    tags = [tag.strip() for tag in caption.split(",")]
    kept, moved = tags[:keep_tokens], tags[keep_tokens:]
    random = np.random.default_rng(zlib.crc32(f"{seed} {caption}".encode()))
    orders = (", ".join([*kept, *(moved[i] for i in random.permutation(len(moved)))]) for _ in range(8 * ORDERS))
    return list(dict.fromkeys(orders))[:ORDERS]


def _lines(path: Path) -> Captions:
    return tuple(line.strip() for line in _text(path).splitlines() if line.strip())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise SVFitError(f"The captions '{path}' can't be read ({error}): save them as UTF-8 text.") from None


def _rows(path: Path) -> list[dict[str, object]]:
    text = _text(path)
    if path.suffix == ".csv":
        return [dict(row) for row in csv.DictReader(io.StringIO(text))]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise SVFitError(
                f'Line {number} of \'{path}\' isn\'t one of {{"file_name": ..., "text": ...}}: correct it.'
            )
        rows.append(row)
    return rows


def _captions(value: object, path: Path) -> Captions:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for text in values:
        if text is not None and not isinstance(text, str):
            raise SVFitError(f"'{path}' has {text!r} where a caption belongs: give text.")
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise SVFitError(f"'{path}' has half a character in {text!r}: save its captions as UTF-8 text.")
    return tuple(text.strip() for text in values if isinstance(text, str) and text.strip())
