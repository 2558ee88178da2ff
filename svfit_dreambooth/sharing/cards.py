"""What generators show beside a LoRA: a preview picture, and A1111's notes on how to call its subject."""

import io
import json
from pathlib import Path

from svfit_dreambooth.adapter.describe import licence_note, read_thumbnail
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.files import write_atomically

VERSIONS = {  # beginning of modelspec's architecture -> A1111's word
    "stable-diffusion-v1": "SD1",
    "stable-diffusion-v2": "SD2",
    "stable-diffusion-xl": "SDXL",
}


def write_cards(lora: Path, adapter: Adapter) -> list[str]:
    """Writes NAME.preview.png and NAME.json beside NAME.safetensors, the file `lora`; says in lines what became of them.

    The picture is the adapter's thumbnail; without one there is none.  What is there already stays: people write their
    own notes into these files.
    """
    contents: dict[Path, bytes] = {}
    thumbnail = read_thumbnail(adapter.metadata)
    if thumbnail is not None:
        content = io.BytesIO()
        thumbnail.save(content, "PNG")
        contents[lora.with_suffix(".preview.png")] = content.getvalue()
    notes = [f"Base: {adapter.base_model}", f"Licence: {licence_note(adapter)}"]
    if adapter.clip_skip:
        notes.append(f"Clip skip: {adapter.clip_skip + 1}")
    card = {
        "description": adapter.metadata.get("modelspec.description", adapter.title),
        "sd version": next(
            (word for start, word in VERSIONS.items() if adapter.architecture.startswith(start)), "Unknown"
        ),
        "activation text": adapter.instance_prompt or "",
        "preferred weight": 1.0,
        "negative text": "",
        "notes": "\n".join(notes),
    }
    contents[lora.with_suffix(".json")] = (json.dumps(card, indent=4, ensure_ascii=False) + "\n").encode()
    lines = []
    for path, new in contents.items():
        if path.exists() and path.read_bytes() != new:
            lines.append(f"{path} is there already and stays as it is")
        else:
            lines.append(str(write_atomically(path, new)))
    return lines
