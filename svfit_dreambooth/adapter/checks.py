"""What an adapter file must be before its values are read: each refusal is one sentence."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from svfit_dreambooth.errors import SVFitError

FORMAT = "svfit"
FORMAT_VERSION = 1
SUFFIX = ".shift"
INDEX_SUFFIX = ".index"
PROJECTION = re.compile(r"[\w-]+(\.[\w-]+)+")  # <component>.<module path>
DTYPES = ("F16", "F32", "BF16")  # safetensors' words for what a file may hold
POSITION_DTYPES = ("I16", "I32")
MAX_VALUES = 2**24  # up to the highest positions, all layers together: 64 MB in memory, ten times all of SDXL
MAX_RANK = 2**16  # singular values of one weight: the widest layers known have some 20,000
EMBEDDING = "textual inversion embedding"
MOST_TOKENS = 225  # of a word in an embedding: three times what CLIP reads at once
MAX_HEADER_BYTES = 16 * 2**20  # all of SDXL needs about 0.3 MB


def check_container(path: Path) -> int:
    """Refuse what can't be a safetensors file by its size and first bytes; return where its values begin."""
    if path.is_dir():
        raise SVFitError(f"'{path}' is a folder: name the adapter file in it.")
    if not path.exists():
        raise SVFitError(f"There is no file '{path}': check the path of the adapter.")
    if not path.is_file():
        raise SVFitError(f"'{path}' isn't a regular file: name an adapter file.")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError as error:
        raise SVFitError(f"'{path}' can't be read ({error.strerror or error}): check its permissions.") from None
    if size == 0:
        raise SVFitError(f"'{path}' is empty: copy or download it again.")
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:] == b"{" and header_bytes <= MAX_HEADER_BYTES:
        if 8 + header_bytes > size:
            raise SVFitError(
                f"'{path}' is cut short: its header alone needs {8 + header_bytes} bytes and the file has {size}; "
                "copy or download it again."
            )
        return 8 + header_bytes
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", head):
        raise SVFitError(
            f"'{path}' is a pickle (.pt, .bin, .ckpt), which may run code when opened, and is not read: "
            "ask for a safetensors file."
        )
    if head[8:] == b"{":
        raise SVFitError(f"The header of '{path}' claims {header_bytes} bytes, {MAX_HEADER_BYTES} is the limit here.")
    raise SVFitError(f"'{path}' isn't a safetensors file: name the .safetensors file that training wrote.")


@contextmanager
def container(path: Path) -> Iterator[Any]:
    """The safetensors file at `path`, open.  Raises SVFitError for what is none, and where it cannot be read within."""
    check_container(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SVFitError:  # a ValueError, too, which says what it has to say
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise SVFitError(f"'{path}' is damaged or cut short ({error}): copy or download it again.") from None


def other_kind(file: Any) -> str | None:
    """What other small changes of a model are called, by the tensors of the open `file`; None: none that is known."""
    keys = list(file.keys())
    if _is_embedding(keys, file):
        return EMBEDDING
    names = "\n".join(keys)
    marks = {
        "LoHa": r"\.hada_w[12]_[ab]$",
        "LoKr": r"\.lokr_w[12](_[ab])?$",
        "LoRA": r"^lora_|lora_(A|B|up|down)|\.lora\.|\.alpha$",
        "SVDiff": r"\.delta$",
    }
    return next((kind for kind, mark in marks.items() if re.search(mark, names, re.MULTILINE)), None)


def _is_embedding(keys: list[str], file: Any) -> bool:
    """A1111's and SDXL's have names of their own; diffusers' is one tensor called by the word, a row a token."""
    if len(keys) == 1 and "." not in keys[0]:
        *tokens, _ = file.get_slice(keys[0]).get_shape() or [0, 0, 0]
        return len(tokens) < 2 and max(tokens, default=1) <= MOST_TOKENS
    return bool(keys) and set(keys) <= {"clip_l", "clip_g", "t5xxl", "emb_params"}


def check_kind(path: Path, file: Any, metadata: dict[str, str]) -> None:
    """Refuse other safetensors files, by what they are, and versions to come."""
    kind = other_kind(file)
    if kind == EMBEDDING:
        raise SVFitError(
            f"'{path}' is a {EMBEDDING}, not an SVFit adapter: load it with pipeline.load_textual_inversion; for other "
            "programs it goes into the folder embeddings, and its name into the prompt."
        )
    if kind == "SVDiff" and metadata.get("format") != FORMAT:
        raise SVFitError(
            f"'{path}' holds spectral shifts of SVDiff ('.delta'), not an SVFit adapter: the command import turns it "
            "into one, or sharing.svdiff.import_svdiff from Python."
        )
    if kind not in (None, "SVDiff"):
        raise SVFitError(f"'{path}' is a {kind}, not an SVFit adapter: load it with pipeline.load_lora_weights.")
    if metadata.get("format") != FORMAT:
        found = f"its format is {metadata['format']!r}" if "format" in metadata else "it names no format"
        raise SVFitError(
            f"'{path}' is a safetensors file but not an SVFit adapter ({found}, an adapter's is {FORMAT!r}): "
            "name the file that training wrote."
        )
    version = required(path, metadata, "format_version")
    if not re.fullmatch(r"[0-9]{1,9}", version) or int(version) < 1:
        raise SVFitError(f"'{path}' has format_version {version!r}, which is no version number: save it again.")
    if int(version) > FORMAT_VERSION:
        raise SVFitError(
            f"'{path}' has format_version {version}, this program reads up to {FORMAT_VERSION}: "
            "update svfit_dreambooth."
        )


def required(path: Path, metadata: dict[str, str], key: str) -> str:
    """A field that every adapter has."""
    if key not in metadata:
        raise SVFitError(f"The header of '{path}' lacks '{key}': save the adapter again.")
    return metadata[key]


def json_object(path: Path, metadata: dict[str, str], key: str) -> dict[str, Any]:
    """A required field, parsed."""
    text = required(path, metadata, key)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        shown = text if len(text) <= 40 else text[:40] + "..."
        raise SVFitError(f"'{key}' in the header of '{path}' isn't a JSON object ({shown!r}): save the adapter again.")
    return value


def read_fingerprint(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Component -> {"sha256": text, "sample": numbers}, as the base's weights are told apart by."""
    fingerprint = json_object(path, metadata, "base_fingerprint")
    for component, entry in fingerprint.items():
        sample = entry.get("sample") if isinstance(entry, dict) else None
        if not isinstance(sample, list) or not all(type(x) in (int, float) and abs(x) < 1e300 for x in sample):
            raise SVFitError(
                f"'base_fingerprint' in '{path}' has no sample of numbers for '{component}': save it again."
            )
        if not isinstance(entry.get("sha256"), str):
            raise SVFitError(f"'base_fingerprint' in '{path}' has no sha256 for '{component}': save it again.")
    return fingerprint


def read_targets(path: Path, metadata: dict[str, str]) -> dict[str, int]:
    """Projection -> rank, as the header lists them, with or without ".shift"."""
    targets = {name.removesuffix(SUFFIX): r for name, r in json_object(path, metadata, "targets").items()}
    for name, rank in targets.items():
        if not PROJECTION.fullmatch(name):
            raise SVFitError(
                f"'targets' in '{path}' names {name[:80]!r}, which is no <component>.<module path>: save it again."
            )
        if type(rank) is not int or rank < 1:
            raise SVFitError(f"'targets' in '{path}' gives '{name}' the rank {rank!r}: it must be 1 or more.")
    if not targets:
        raise SVFitError(f"'{path}' lists no targets, so there is nothing to apply: train it again.")
    return targets


def check_same_projections(path: Path, keys: list[str], targets: dict[str, int]) -> set[str]:
    """Refuse a file that holds less or more than its header lists; return the projections that have an index."""
    expected = {name + SUFFIX for name in targets}
    indices = {name + INDEX_SUFFIX for name in targets}
    if missing := sorted(expected - set(keys)):
        raise SVFitError(
            f"'{path}' lacks {len(missing)} of the {len(expected)} tensors its targets list, first '{missing[0]}': "
            "copy or download it again."
        )
    if surplus := sorted(set(keys) - expected - indices):
        raise SVFitError(
            f"'{path}' holds {len(surplus)} tensors that its targets don't list, first '{surplus[0]}': save it again."
        )
    return {key.removesuffix(INDEX_SUFFIX) for key in indices & set(keys)}


def check_header_entry(path: Path, key: str, rank: int, entry: Any, dtypes: tuple[str, ...] = DTYPES) -> None:
    """Refuse a tensor by the shape and type its header gives (`entry`: safe_open's get_slice)."""
    shape, dtype = list(entry.get_shape()), entry.get_dtype()
    if shape != [rank]:
        raise SVFitError(f"'{key}' in '{path}' has shape {shape}, its targets say [{rank}]: save it again.")
    if dtype not in dtypes:
        raise SVFitError(f"'{key}' in '{path}' is {dtype}, only {', '.join(dtypes)} are read: save it again.")


def check_positions(path: Path, positions: dict[str, Tensor]) -> None:
    """Refuse positions (r,) of values that don't ascend from 0, and those for which no base is large enough."""
    for name, places in positions.items():
        if places[0] < 0 or (places[1:] <= places[:-1]).any():
            raise SVFitError(f"'{name}{INDEX_SUFFIX}' in '{path}' doesn't ascend from 0: save it again.")
        if places[-1] >= MAX_RANK:
            raise SVFitError(
                f"'{name}{INDEX_SUFFIX}' in '{path}' reaches {int(places[-1])}, {MAX_RANK} is the limit here."
            )
    if (total := sum(int(places[-1]) + 1 for places in positions.values())) > MAX_VALUES:
        raise SVFitError(f"'{path}' claims positions among {total} values, {MAX_VALUES} is the limit here.")


def file_sha256(path: Path, start: int) -> str:
    """SHA-256 of everything from byte `start` to the end."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
