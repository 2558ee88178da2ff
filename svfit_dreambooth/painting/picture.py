"""A generated picture: a PNG that tells how it was made."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from svfit_dreambooth import __version__
from svfit_dreambooth.files import save_png

LONGEST_NAME = 200  # bytes of a file's name before its number; file systems take 255 in all


@dataclass
class Picture:
    """A generated picture and the settings that make it again."""

    image: Image.Image
    settings: dict[str, Any]  # prompt, seed, adapters and strengths, base, steps, guidance, size
    filtered: bool  # the base's content filter blacked it out


def save_picture(picture: Picture, path: Path) -> Path:
    """Writes a PNG with the settings inside: as JSON under "svfit", and as the "parameters" text that viewers show."""
    settings = picture.settings
    info = PngInfo()
    info.add_itxt("svfit", _utf8(json.dumps(settings, ensure_ascii=False, allow_nan=False)))
    adapters = ", ".join(f"{name}:{strength:g}" for name, strength in settings["adapters"].items())
    sampler = f"Sampler: {settings['scheduler']}, " if "scheduler" in settings else ""
    lines = [settings["prompt"]]
    vae = f"VAE: {settings['vae']}, " if settings.get("vae") else ""
    clip_skip = f"Clip skip: {settings['clip_skip'] + 1}, " if settings.get("clip_skip") else ""  # as A1111 counts
    rescale = f"CFG rescale: {settings['guidance_rescale']:g}, " if settings.get("guidance_rescale") else ""
    if settings["negative_prompt"]:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(
        f"Steps: {settings['num_inference_steps']}, CFG scale: {settings['guidance_scale']:g}, {rescale}"
        f"Seed: {settings['seed']}, Size: {settings['width']}x{settings['height']}, Model: {settings['base_model']}, "
        f"{clip_skip}{sampler}{vae}Adapters: {adapters or 'none'}, Version: svfit-dreambooth {__version__}"
    )
    info.add_itxt("parameters", _utf8("\n".join(lines)))
    return save_png(picture.image, path, pnginfo=info)


def _utf8(text: str) -> str:
    """`text` with what no text can hold, from file names in other encodings, as JSON spells it: \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def free_path(folder: Path, stem: str) -> Path:
    """A path in `folder` that no file has: nothing that was generated before is overwritten.

    A very long `stem` is cut, so that the name fits into a file system.
    """
    while len(os.fsencode(stem)) > LONGEST_NAME:
        stem = stem[:-1]
    number = 0
    while (path := folder / f"{stem}-{number:03d}.png").exists():
        number += 1
    return path
