"""What files say about themselves to other programs: ModelSpec fields, kohya's `ss_*`, licence, thumbnail, hashes.

ModelSpec: https://github.com/Stability-AI/ModelSpec.  `ss_*` are the fields of sd-scripts that generators show or tell
the base by; only those are written that we know.
"""

import base64
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import safe_open

from svfit_dreambooth.adapter.checks import SUFFIX
from svfit_dreambooth.adapter.file import Adapter, read_adapter, save_adapter
from svfit_dreambooth.bases.opening import BaseModel
from svfit_dreambooth.errors import SVFitError

THUMBNAIL_SIDE = 256  # pixels, as ModelSpec recommends
MAX_THUMBNAIL_BYTES = 1_000_000
TEXT_FIELDS = ("title", "author", "description", "license", "tags", "usage_hint")  # what people may fill in

OF_THE_BASE = "as the base model's"  # how the licence begins that files get by themselves
LICENCES = {  # beginning of modelspec's architecture -> the licence that the family's original weights are under
    "toybox": "Apache-2.0",
    "stable-diffusion-v1": "CreativeML OpenRAIL-M",
    "stable-diffusion-v2": "CreativeML OpenRAIL++-M",
    "stable-diffusion-xl": "CreativeML OpenRAIL++-M",
}
KOHYA_VERSIONS = {  # beginning of modelspec's architecture -> ss_base_model_version
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2": "sd_v2",
    "stable-diffusion-xl": "sdxl_base_v1-0",
}


def _of_family(table: dict[str, str], architecture: str) -> str | None:
    return next((value for key, value in table.items() if architecture.startswith(key)), None)


def licence_note(adapter: Adapter) -> str:
    """The licence that whoever shares the adapter, or what is made of it, has to mind."""
    if "modelspec.license" in adapter.metadata:
        return adapter.metadata["modelspec.license"]
    known = _of_family(LICENCES, adapter.architecture)
    return f"{OF_THE_BASE}, {known}" if known else f"{OF_THE_BASE} ({adapter.base_model})"


def prediction_type(scheduler_config: Any) -> str:
    """ModelSpec's word for what the base predicts."""
    return "v" if scheduler_config.get("prediction_type") == "v_prediction" else "epsilon"


def base_metadata(base: BaseModel) -> dict[str, str]:
    """ModelSpec fields that an adapter, and what is made of it, takes over from `base`: for `Adapter.metadata`."""
    known = _of_family(LICENCES, base.architecture)
    return {
        "modelspec.resolution": f"{base.resolution}x{base.resolution}",
        "modelspec.prediction_type": prediction_type(base.pipeline.scheduler.config),
        **({"modelspec.license": f"{OF_THE_BASE}, {known}"} if known else {}),
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


def lora_metadata(
    adapter: Adapter,
    *,
    title: str,
    scale: float,
    ranks: dict[str, int],
    alpha: float,
    error: float,
    base: BaseModel,
) -> dict[str, str]:
    """The header of a LoRA made from `adapter` at the strength `scale`, without hashes; all values are text.

    `ranks`: layer -> rank.  `error`: share of the adapter's change that is left out.
    """
    architecture, prediction = adapter.architecture, prediction_type(base.pipeline.scheduler.config)
    if architecture == "stable-diffusion-v2":
        architecture += "-768-v" if prediction == "v" else "-512"
    metadata = {key: value for key, value in adapter.metadata.items() if key.startswith("modelspec.")}
    metadata |= base_metadata(base) | {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "modelspec.license": licence_note(adapter),
        "ss_output_name": title,
        "ss_sd_model_name": adapter.base_model,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(ranks.values())),
        "ss_network_alpha": f"{alpha:g}",
        "svfit_source": json.dumps(
            {
                "base_model": adapter.base_model,
                "payload_sha256": adapter.metadata.get("payload_sha256"),
                "scale": scale,
                "left_out": round(error, 6),
            }
        ),
    }
    metadata.pop("modelspec.hash_sha256", None)  # of the adapter, not of this file
    version = _of_family(KOHYA_VERSIONS, architecture)
    if version is not None:
        v = version == "sd_v2" and prediction == "v"
        metadata |= {"ss_base_model_version": version + ("_v" if v else ""), "ss_v2": str(version == "sd_v2")}
    training = adapter.training
    for key, ours in (
        ("ss_steps", "steps"),
        ("ss_num_train_images", "photos"),
        ("ss_learning_rate", "learning_rate"),
        ("ss_seed", "seed"),
    ):
        if training.get(ours) is not None:
            metadata[key] = str(training[ours])
    if training.get("resolution") is not None:
        metadata["ss_resolution"] = f"({training['resolution']}, {training['resolution']})"
    if adapter.instance_prompt:
        count = training.get("photos", 1)
        metadata |= {
            "modelspec.trigger_phrase": adapter.instance_prompt,
            "ss_tag_frequency": json.dumps({"photos": {adapter.instance_prompt: count}}, ensure_ascii=False),
        }
        metadata.setdefault("modelspec.usage_hint", f"Write {adapter.instance_prompt!r} for the subject.")
    return metadata


def hashes(payload_sha256: str) -> dict[str, str]:
    """The fields that name the hash of a file's tensor bytes, given in hexadecimal."""
    return {"modelspec.hash_sha256": "0x" + payload_sha256, "sshs_model_hash": payload_sha256}
