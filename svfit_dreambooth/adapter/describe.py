"""What adapter files say about themselves: what is in them, ModelSpec fields, licence, thumbnail.

ModelSpec: https://github.com/Stability-AI/ModelSpec.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import safe_open

from svfit_dreambooth.adapter.checks import SUFFIX
from svfit_dreambooth.adapter.file import Adapter, read_adapter, save_adapter, stored_values
from svfit_dreambooth.adapter.licences import OF_THE_BASE, of_family
from svfit_dreambooth.errors import SVFitError

THUMBNAIL_SIDE = 256  # pixels, as ModelSpec recommends
MAX_THUMBNAIL_BYTES = 1_000_000
TEXT_FIELDS = ("title", "author", "description", "license", "tags", "usage_hint")  # what people may fill in


def licence_note(adapter: Adapter) -> str:
    """The licence that whoever shares the adapter, or what is made of it, has to mind."""
    if "modelspec.license" in adapter.metadata:
        return adapter.metadata["modelspec.license"]
    known = of_family(adapter.architecture)
    return f"{OF_THE_BASE}, {known.name}" if known else f"{OF_THE_BASE} ({adapter.base_model})"


def base_metadata(architecture: str, resolution: int, prediction_type: str | None) -> dict[str, str]:
    """ModelSpec fields that an adapter, and what is made of it, takes over from its base: for `Adapter.metadata`.

    `architecture`, `prediction_type`: ModelSpec's words, see `bases.family`.  `resolution`: pixels of a side.
    """
    known = of_family(architecture)
    return {
        "modelspec.resolution": f"{resolution}x{resolution}",
        **({"modelspec.prediction_type": prediction_type} if prediction_type else {}),
        **({"modelspec.license": f"{OF_THE_BASE}, {known.name}"} if known else {}),
    }


def thumbnail_url(picture: Image.Image, side: int = THUMBNAIL_SIDE) -> str:
    """A small square JPEG of the middle of `picture` as a data URL, at most `side` pixels wide, never enlarged."""
    edge = min(side, *picture.size)
    picture = ImageOps.fit(picture.convert("RGB"), (edge, edge), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def read_thumbnail(metadata: dict[str, str]) -> Image.Image | None:
    """The picture that a file carries; None if it has none that is a small JPEG or PNG."""
    match = re.fullmatch(r"data:image/(jpeg|png);base64,([A-Za-z0-9+/=\s]+)", metadata.get("modelspec.thumbnail", ""))
    if not match or len(match[2]) > MAX_THUMBNAIL_BYTES:
        return None
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(match[2])), formats=[match[1].upper()])
        if max(picture.size) > 1024:
            return None
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def annotate_adapter(path: str | Path, *, thumbnail: Image.Image | None = None, **fields: str | None) -> Path:
    """Writes people's own words, and a picture, into the header of the adapter at `path`; its values stay as they are.

    `fields`: any of title, author, description, license, tags, usage_hint; an empty text removes the field, None
    leaves it.  Raises SVFitError for another field, and as `read_adapter` and `save_adapter` do.
    """
    path = Path(path)
    adapter = read_adapter(path)
    for name, text in fields.items():
        if name not in TEXT_FIELDS:
            raise SVFitError(f"{name!r} is not among the fields that can be set: {', '.join(TEXT_FIELDS)}.")
        if text is None:
            continue
        if name == "title":
            adapter.title = text
        elif text:
            adapter.metadata[f"modelspec.{name}"] = text
        else:
            adapter.metadata.pop(f"modelspec.{name}", None)
    if thumbnail is not None:
        adapter.metadata["modelspec.thumbnail"] = thumbnail_url(thumbnail)
    return save_adapter(adapter, path, stored_dtype(path))


def stored_dtype(path: str | Path) -> torch.dtype:
    """The type to save an adapter file in again without loss."""
    with safe_open(path, framework="pt") as file:
        types = {file.get_slice(key).get_dtype() for key in file.keys() if key.endswith(SUFFIX)}  # noqa: SIM118
    return torch.float16 if types == {"F16"} else torch.float32


def describe_adapter(adapter: Adapter, path: str | Path | None = None) -> dict[str, Any]:
    """What an adapter holds, as plain data for printing or JSON.

    "components", "blocks" and "total" give projections, values, rank_min, rank_max and strength: the root mean square
    of the shifts, in units of the base's singular values.  With `path`, "file_bytes" too.
    """
    by_component: dict[str, list[torch.Tensor]] = {}
    by_block: dict[str, list[torch.Tensor]] = {}
    for name in sorted(adapter.shifts, key=natural_order):
        by_component.setdefault(name.partition(".")[0], []).append(adapter.shifts[name])
        by_block.setdefault(block_name(name), []).append(adapter.shifts[name])
    description: dict[str, Any] = {
        "title": adapter.title,
        "base_model": adapter.base_model,
        "instance_prompt": adapter.instance_prompt,
        "class_prompt": adapter.class_prompt,
        "training": dict(adapter.training),
        "learned_words": [word.word for word in adapter.learned_words],
        "components": {name: _summary(shifts) for name, shifts in by_component.items()},
        "blocks": {name: _summary(shifts) for name, shifts in by_block.items()},
        "total": _summary(list(adapter.shifts.values())),
    }
    if path is not None:
        description["file_bytes"] = Path(path).stat().st_size
    return description


def _summary(shifts: list[torch.Tensor]) -> dict[str, int | float]:
    ranks = [stored_values(shift) for shift in shifts] or [0]
    return {
        "projections": len(shifts),
        "values": sum(ranks),
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "strength": strength(shifts),
    }


def strength(shifts: Sequence[torch.Tensor]) -> float:
    """The root mean square of the values that a file holds of `shifts`, (r,) each: of few scattered ones, theirs."""
    squares = sum(shift.double().square().sum().item() for shift in shifts)
    return (squares / max(sum(stored_values(shift) for shift in shifts), 1)) ** 0.5


def block_name(name: str) -> str:
    """'text_encoder.text_model.encoder.layers.0...' -> 'text_encoder layers.0'; one without number keeps its name."""
    component, *parts = name.split(".")
    first_number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    if first_number == 0 or parts[0].endswith("block"):
        return f"{component} {parts[0]}"
    return f"{component} {parts[first_number - 1]}.{parts[first_number]}"


def natural_order(name: str) -> str:
    """Sorts layers.2 before layers.10."""
    return re.sub(r"[0-9]+", lambda number: number[0].zfill(9), name)
