"""Writing files so that what was there before is whole until the new one is (temporary file, then rename); their size."""

import io
import os
import re
import secrets
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from svfit_dreambooth.errors import SVFitError

MAX_NAME = 60  # characters of a name that a person gives
MAX_NAME_BYTES = 180  # with which the longest ending still fits into the 255 that disks take
DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.IGNORECASE)
TEMPORARY = ".svfit-*.tmp"  # what a process that was killed while writing leaves


class NotWritten(SVFitError):
    """A file that the disk or its folder did not take."""


def write_atomically(path: str | Path, content: bytes | str) -> Path:
    """Makes `path` hold `content`, or leaves it as it was; missing parent folders are made.

    Raises NotWritten where the disk is full or the place cannot be written.
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode("utf-8")
    temporary = path.parent / f".svfit-{secrets.token_hex(8)}.tmp"  # same folder: os.replace can't cross disks
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotWritten(f"'{path}' can't be written ({reason}): choose another place.") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def check_output(
    path: str | Path, suffix: str, inputs: Iterable[str | Path | None] = (), overwrite: bool = False
) -> Path:
    """`path` itself, where a file of the kind `suffix`, ".png", ".json" or ".safetensors", may be written.

    An output is never one of the `inputs`, never a file that is there already unless `overwrite` is given, and never
    takes the place of another kind of file.  Raises SVFitError otherwise; commands ask before the work starts.
    """
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise SVFitError(f"'{path}' is to become a {suffix[1:]} file: give a name that ends in {suffix}.")
    if path.is_dir():
        raise SVFitError(f"'{path}' is a folder: name a file in it.")
    for source in inputs:
        if source is not None and _same_file(path, Path(source)):
            raise SVFitError(
                f"'{path}' is what the output is made from, which must not be replaced: choose another name."
            )
    if path.exists():
        if not overwrite:
            raise SVFitError(
                f"'{path}' exists already: choose another name, or add overwrite to replace it.", "overwrite"
            )
        if not _is_kind(path, suffix):
            raise SVFitError(f"'{path}' is no {suffix[1:]} file, so it is not replaced by one: choose another name.")
    return path


def _same_file(path: Path, other: Path) -> bool:
    """Whether both name one file, be it by another spelling, by a link, or before it exists."""
    try:
        return path.samefile(other)
    except OSError:
        return path.resolve() == other.resolve()


def _is_kind(path: Path, suffix: str) -> bool:
    """Whether the file at `path` begins as one of its kind does: a safetensors file with a length and a brace."""
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(9)
        return {".safetensors": head[8:] == b"{", ".png": head.startswith(b"\x89PNG"), ".json": head[:1] in b"{["}[
            suffix
        ]
    return False


def share(path: Path) -> None:
    """Gives the file at `path` the rights that a new file of this user has: some writers make it theirs alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def save_png(image: Image.Image, path: str | Path, **options: Any) -> Path:
    """Writes `image` as PNG, whole or not at all; `options` are Pillow's."""
    content = io.BytesIO()
    image.save(content, format="PNG", **options)
    return write_atomically(path, content.getvalue())


def file_name(text: str, what: str = "name") -> str:
    """`text` as the name of a file on any system: letters, digits, '-', '_' and '.', at most 60 of them.

    `what`: what a message calls it.  Raises SVFitError if nothing is left, or a name that Windows keeps for itself.
    """
    name = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", text.strip())).strip("-.")[:MAX_NAME]
    while len(name.encode()) > MAX_NAME_BYTES:
        name = name[:-1]
    name = name.strip("-.")
    if not name:
        raise SVFitError(f"the {what} {text!r} has no letters or digits: give one, such as my-dog.")
    check_portable(name, what)
    return name


def check_portable(name: str, what: str = "name") -> None:
    """Raises SVFitError for the name of a file that could not be moved to another system."""
    if DEVICES.fullmatch(name):
        raise SVFitError(f"the {what} {name!r} stands for a device on Windows: choose another, such as my-{name}.")
    if len(name.encode()) > MAX_NAME_BYTES:
        raise SVFitError(f"the {what} {name!r} is {len(name.encode())} bytes long: at most {MAX_NAME_BYTES} are safe.")


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"
