"""Tensors that are kept on disk so that they need not be made again: a file is believed by its checksum alone."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svfit_dreambooth.files import write_atomically

FORMAT = "svfit-kept-1"


def keep(path: Path, tensors: Mapping[str, Tensor], facts: str = "") -> None:
    """Writes `tensors`, contiguous and on the CPU, and a text beside them.  Raises SVFitError where that cannot be."""
    metadata = {"format": FORMAT, "facts": facts, "sha256": _checksum(tensors, facts)}
    write_atomically(path, save(dict(tensors), metadata))


def kept(path: Path) -> tuple[dict[str, Tensor], str] | None:
    """The tensors and the text that `keep` wrote; None where there are none, or damaged ones."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
            facts = metadata["facts"]
            whole = metadata["format"] == FORMAT and metadata["sha256"] == _checksum(tensors, facts)
    except (SafetensorError, OSError, KeyError):
        return None
    return (tensors, facts) if whole else None


def note_of(path: Path) -> str | None:
    """The text beside kept tensors, which are not looked at; "" where the file is damaged, None for somebody else's."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return ""
    return metadata.get("facts", "") if metadata.get("format") == FORMAT else None


def _checksum(tensors: Mapping[str, Tensor], facts: str) -> str:
    """Over names, types, shapes and numbers of all tensors, and the text."""
    return hashlib.sha256(save(dict(tensors)) + facts.encode()).hexdigest()
