"""The adapter file: write, read, check.  The format itself is specified in docs/adapter-format.md.

An adapter is one short vector a projection: `shift`, shape (rank,), along the base model's own singular directions
(`W' = W + U diag(shift) Vh`, Sun et al. 2024, arXiv 2409.05926).  This room knows files, not models.
"""

import hashlib
import json
import re
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from svfit_dreambooth.adapter.checks import (
    FORMAT,
    FORMAT_VERSION,
    INDEX_SUFFIX,
    POSITION_DTYPES,
    PROJECTION,
    SUFFIX,
    check_container,
    check_header_entry,
    check_kind,
    check_positions,
    check_same_projections,
    file_sha256,
    json_object,
    read_fingerprint,
    read_targets,
    required,
)
from svfit_dreambooth.adapter.words import HEADER_KEY, LearnedWord, read_words, word_key, word_metadata, word_tensors
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically

MODELSPEC = {"sai_model_spec", "architecture", "implementation", "title", "date", "hash_sha256", "trigger_phrase"}
OWN_METADATA = {f"modelspec.{name}" for name in MODELSPEC} | {"format", "format_version", "payload_sha256"}
TENSORS_HASH = "tensors_sha256"
SPARSE_ENTRY_BYTES = 160  # what a second tensor costs in the header, about
OWN_METADATA |= {
    "base_model",
    "base_fingerprint",
    "targets",
    "instance_prompt",
    "class_prompt",
    "training",
    HEADER_KEY,
    TENSORS_HASH,
}


@dataclass
class Adapter:
    """What an adapter file holds."""

    shifts: dict[str, torch.Tensor]  # canonical projection name, without ".shift" -> (rank,), float32, leading first
    base_model: str  # hub id (with "@revision"), the embedded base's word, or a display name
    base_fingerprint: dict[str, Any]
    instance_prompt: str | None = None
    class_prompt: str | None = None
    training: dict[str, Any] = field(default_factory=dict)  # the run's settings, for people to read
    title: str = ""  # empty: the file's name when saved
    architecture: str = "stable-diffusion"  # modelspec's word for the base, such as "stable-diffusion-v1"
    learned_words: list[LearnedWord] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)  # header as read; keys this room doesn't own are saved again

    @property
    def ranks(self) -> dict[str, int]:
        """Projection name -> number of values that its file holds."""
        return {name: stored_values(shift) for name, shift in self.shifts.items()}

    @property
    def components(self) -> list[str]:
        """The model parts that are adapted, such as "text_encoder", by name."""
        learned = {component for word in self.learned_words for component in word.deltas}
        return sorted({name.partition(".")[0] for name in self.shifts} | learned)

    def word_deltas(self) -> dict[str, torch.Tensor]:
        """The tensors of the learned words, by their names in the file -> (tokens, dim)."""
        return {word_key(c, i): delta for i, word in enumerate(self.learned_words) for c, delta in word.deltas.items()}

    @property
    def clip_skip(self) -> int:
        """How many layers earlier CLIP was read in training, see `bases.clip_skip`; 0 where the header says nothing."""
        value = self.training.get("clip_skip")
        return value if type(value) is int and value > 0 else 0

    def component_shifts(self, component: str) -> dict[str, torch.Tensor]:
        """The shifts of one model part: module path, without the component -> (rank,)."""
        return {n.partition(".")[2]: shift for n, shift in self.shifts.items() if n.startswith(component + ".")}


# ---------------------------------------------------------------- writing


def save_adapter(adapter: Adapter, path: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write `adapter` to `path`, all or nothing: a file already there stays whole until the new one is complete.

    Missing parent folders are made.  A shift that is mostly zeros is written as the others and their positions, where
    that is smaller; read again it ends at the last of them.  Nothing of the author's disk is stored: a `base_model`
    that is an absolute path, or has more than the one slash of a hub id, is reduced to its last component, and so are
    absolute paths among the values of `training`; keys of `training` that end in _dir, _path or _file are left out.

    dtype: torch.float16 (2 bytes a value) or torch.float32 (exact).
    Raises SVFitError for shifts that are not finite, not 1-D, or too large for float16, and for a path that can't be
    written.
    """
    path = Path(path)
    if path.is_dir():
        raise SVFitError(f"'{path}' is a folder: name a file in it, such as '{path / 'adapter.safetensors'}'.")
    tensors = {}
    for name, shift in adapter.shifts.items():
        values, positions = _compact(_stored(name, shift, dtype))
        tensors[name + SUFFIX] = values
        if positions is not None:
            tensors[name + INDEX_SUFFIX] = positions
    if not tensors:
        raise SVFitError(f"The adapter for '{path}' holds no shifts: nothing was saved.")
    tensors |= word_tensors(adapter.learned_words, dtype)
    try:
        ranks = {name: tensors[name + SUFFIX].numel() for name in adapter.shifts}
        metadata = _metadata(adapter, path, ranks, _payload_sha256(tensors)) | {TENSORS_HASH: tensors_sha256(tensors)}
        content = serialize(tensors, metadata)
    except UnicodeEncodeError as error:
        raise SVFitError(f"The metadata holds text that isn't valid Unicode ({error.object!r}): correct it.") from None
    write_atomically(path, content)
    return path


def _stored(name: str, shift: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The shift as the file will hold it, checked."""
    if dtype not in (torch.float16, torch.float32):
        raise SVFitError(f"An adapter is saved as torch.float16 or torch.float32, not as {dtype}.")
    if not PROJECTION.fullmatch(name) or name.endswith(SUFFIX):
        raise SVFitError(
            f"'{name}' isn't a projection's name: it must read <component>.<module path>, without '{SUFFIX}'."
        )
    shift = shift.detach().to("cpu")
    if shift.ndim != 1 or shift.numel() == 0:
        raise SVFitError(f"The shift of '{name}' has shape {tuple(shift.shape)}: it must be (rank,), rank at least 1.")
    if not torch.isfinite(shift).all():
        raise SVFitError(f"The shift of '{name}' holds NaN or infinity: train with a lower learning rate.")
    stored = shift.to(dtype, copy=True).contiguous()
    if not torch.isfinite(stored).all():
        largest = shift.abs().max().item()
        limit = torch.finfo(dtype).max
        raise SVFitError(
            f"The shift of '{name}' reaches {largest:g}, {str(dtype)[6:]} ends at {limit:g}: "
            + ("save it as float32." if dtype == torch.float16 else "no adapter is this strong.")
        )
    return stored


def _compact(shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The values of `shift` that a file holds, and their positions, ascending; None where it holds all in order."""
    positions = shift.nonzero().flatten().to("cpu", torch.int16 if len(shift) <= 2**15 else torch.int32)
    sparse = len(positions) * (2 + positions.element_size()) + SPARSE_ENTRY_BYTES  # bytes, in float16
    if len(positions) == 0 or sparse >= 2 * len(shift):
        return shift, None
    return shift[positions.long()].contiguous(), positions


def stored_values(shift: torch.Tensor) -> int:
    """How many values a file holds of `shift` (r,)."""
    return len(_compact(shift)[0])


def _payload_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the bytes after the header; metadata lives in the header and doesn't move them."""
    content = serialize(tensors)
    (header_bytes,) = struct.unpack("<Q", content[:8])
    return hashlib.sha256(content[8 + header_bytes :]).hexdigest()


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of every tensor in the order of their names: "<name> <dtype> <shape>", a line feed, its bytes.

    Unlike `payload_sha256` it tells a file whose names, types or places were exchanged.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {str(tensor.dtype)[6:]} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _metadata(adapter: Adapter, path: Path, ranks: dict[str, int], payload_sha256: str) -> dict[str, str]:
    metadata = {key: value for key, value in adapter.metadata.items() if key not in OWN_METADATA}
    metadata |= {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "base_model": _display_name(adapter.base_model),
        "base_fingerprint": _to_json("base_fingerprint", adapter.base_fingerprint),
        "targets": _to_json("targets", ranks),
        "training": _to_json("training", _without_paths(adapter.training)),
        "payload_sha256": payload_sha256,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{adapter.architecture}/{FORMAT}",
        "modelspec.implementation": "diffusers",
        "modelspec.title": adapter.title or path.stem,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "modelspec.hash_sha256": "0x" + payload_sha256,
    }
    metadata |= word_metadata(adapter.learned_words)
    if adapter.instance_prompt is not None:
        metadata |= {"instance_prompt": adapter.instance_prompt, "modelspec.trigger_phrase": adapter.instance_prompt}
    if adapter.class_prompt is not None:
        metadata |= {"class_prompt": adapter.class_prompt}
    return metadata


def _to_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SVFitError(f"'{name}' can't be written as JSON ({error}): keep to finite numbers, text, lists.") from None


def _display_name(base_model: str) -> str:
    """A hub id as it is; of anything that looks like a place on a disk, the last component."""
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]*\w)?(@\w[\w.-]*(/[\w.-]+)*)?", base_model):
        return base_model
    parts = [part for part in re.split(r"[/\\]", base_model) if part.strip(".~: ")]
    return parts[-1] if parts else "unnamed"


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if not str(k).endswith(("_dir", "_path", "_file"))}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, str) and (
        PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute() or value.startswith("~")
    ):
        return _display_name(value)
    return value


# ---------------------------------------------------------------- reading


def read_adapter(path: str | Path) -> Adapter:
    """Read and check an adapter file; shifts come back as float32 on the CPU.

    Nothing in the file is executed, no tensor is read before the header agrees with the file's size, and whatever is
    not a whole, unharmed adapter of a known version raises SVFitError with one sentence.
    """
    path = Path(path)
    payload_start = check_container(path)
    try:
        opened = safe_open(path, framework="pt")  # maps the file, checks every offset against its size
    except (SafetensorError, OSError, ValueError) as error:
        raise SVFitError(f"'{path}' is damaged or cut short ({error}): copy or download it again.") from None
    with opened as file:
        keys, metadata = list(file.keys()), dict(file.metadata() or {})
        check_kind(path, file, metadata)
        targets = read_targets(path, metadata)
        words = read_words(path, keys, metadata, file)
        of_words = {word_key(component, i) for i, word in enumerate(words) for component in word.deltas}
        indexed = check_same_projections(path, [key for key in keys if key not in of_words], targets)
        for name, rank in targets.items():
            check_header_entry(path, name + SUFFIX, rank, file.get_slice(name + SUFFIX))
            if name in indexed:
                check_header_entry(
                    path, name + INDEX_SUFFIX, rank, file.get_slice(name + INDEX_SUFFIX), POSITION_DTYPES
                )
        if file_sha256(path, payload_start) != required(path, metadata, "payload_sha256").lower():
            raise SVFitError(f"The values in '{path}' don't match its payload_sha256, so it is damaged: copy it again.")
        if TENSORS_HASH in metadata and tensors_sha256({k: file.get_tensor(k) for k in keys}) != metadata[TENSORS_HASH]:
            raise SVFitError(
                f"The names, types or places of the values in '{path}' don't match its {TENSORS_HASH}, so it is "
                "damaged: copy it again."
            )
        shifts = {name: file.get_tensor(name + SUFFIX).to(torch.float32, copy=True) for name in targets}
        positions = {name: file.get_tensor(name + INDEX_SUFFIX).long() for name in indexed}
    check_positions(path, positions)
    for name, places in positions.items():
        shifts[name] = torch.zeros(int(places[-1]) + 1).index_copy_(0, places, shifts[name])
    for name, shift in shifts.items():
        if not torch.isfinite(shift).all():
            raise SVFitError(f"'{path}' holds NaN or infinity in '{name}{SUFFIX}': train the adapter again.")
    return Adapter(
        shifts=shifts,
        base_model=required(path, metadata, "base_model"),
        base_fingerprint=read_fingerprint(path, metadata),
        instance_prompt=metadata.get("instance_prompt"),
        class_prompt=metadata.get("class_prompt"),
        training=json_object(path, metadata, "training") if "training" in metadata else {},
        title=metadata.get("modelspec.title", ""),
        learned_words=words,
        architecture=metadata.get("modelspec.architecture", Adapter.architecture).removesuffix(f"/{FORMAT}"),
        metadata=metadata,
    )


def is_adapter(path: str | Path) -> bool:
    """Whether the header at `path` says that it is an SVFit adapter; never raises, and reads nothing else."""
    try:
        check_container(Path(path))
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SVFitError, SafetensorError, OSError, ValueError):
        return False
