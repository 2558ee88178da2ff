"""The pictures of one visitor: a folder of PNG files that tell how they were made."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.orders import Order

EARLIER = 60  # that are shown of those painted before
MAX_TEXT = 100_000  # characters of settings in a file
UNUSUAL: dict[str, tuple[Any, str]] = {  # settings that only some pictures have: their kind, and what people call them
    "guidance_rescale": (int | float, "guidance rescale"),
    "scheduler": (str, "sampler"),
    "clip_skip": (int, "clip skip"),
    "vae": (str, "autoencoder"),
    "quantize": (str, "base in fewer bits"),
    "trained_on": (str, "trained on"),
}


def earlier(folder: Path, most: int = EARLIER, words: str = "") -> list[str]:
    """File names, newest first; of those alone of which all `words` are said: in prompt, adapters, base or seed."""
    paths = [path for path in folder.glob("*.png") if not path.name.startswith(".")]
    paths.sort(key=lambda path: (-path.stat().st_mtime_ns, path.name))
    wanted = words.casefold().split()
    fitting = (path.name for path in paths if not wanted or all(word in _said_of(path) for word in wanted))
    return list(itertools.islice(fitting, most))


def _said_of(path: Path) -> str:
    return " ".join(value for _, value in describe(found)).casefold() if (found := _known(path)) else ""


def prompts(folder: Path, most: int = 40) -> list[str]:
    """What was painted lately, each prompt once, newest first."""
    known = (_known(folder / name) for name in earlier(folder, 5 * EARLIER))
    return list(dict.fromkeys(settings["prompt"] for settings in known if settings))[:most]


def _known(path: Path) -> dict[str, Any] | None:
    """The settings in a picture, read once; None for one that holds none."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (SVFitError, OSError):
        return None


@functools.lru_cache(maxsize=20_000)
def _read(path: Path, changed: int) -> dict[str, Any]:
    return read_settings(path)


def find(folder: Path, name: Any) -> Path:
    """The file called `name`.  Raises SVFitError if the folder has none."""
    if not isinstance(name, str) or name not in {path.name for path in folder.glob("*.png")}:
        raise SVFitError("that picture is not there any more: select another one.")
    return folder / name


def keep(folder: Path, order: Order, picture: Any) -> Path:
    """Writes a picture that was painted to `order` beside the others."""
    from svfit_dreambooth.painting.picture import free_path, save_picture

    stem = "-".join(path.stem for path, _ in order.adapters)[:80] or "base"
    return save_picture(picture, free_path(folder, stem))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a PNG of ours, each of the kind it must have.  Raises SVFitError for any other file."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()  # text may stand after the pixels
            text = getattr(picture, "text", {}).get("svfit")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise SVFitError(f"{path.name} is not a readable PNG file: choose a picture made here.") from None
    try:
        settings = json.loads(text) if text and len(text) <= MAX_TEXT else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise SVFitError(f"{path.name} holds no settings: choose a picture made here, as it was downloaded.")
    read: dict[str, Any] = {}
    for name, kinds in (
        ("prompt", str),
        ("negative_prompt", str),
        ("base_model", str),
        ("seed", int),
        ("num_inference_steps", int),
        ("width", int),
        ("height", int),
        ("guidance_scale", int | float),
    ):
        value = settings.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise SVFitError(f"{path.name} has no usable {name.replace('_', ' ')}: choose a picture made here.")
        read[name] = value
    for name, kind in [(name, kind) for name, (kind, _) in UNUSUAL.items()] + [("strength", int | float)]:
        if isinstance(settings.get(name), kind) and not isinstance(settings[name], bool):
            read[name] = settings[name]
    if settings.get("prompt_weights") is True:
        read["prompt_weights"] = True
    strengths = settings.get("adapters")
    read["adapters"] = {
        str(name): float(strength)
        for name, strength in (strengths.items() if isinstance(strengths, dict) else ())
        if isinstance(strength, int | float)
    }
    return read


def caption(settings: dict[str, Any], different: str = "") -> str:
    """What stands under a picture; `different`: what sets it off from those beside it."""
    if different:
        return f"{different} · seed {settings['seed']}"
    if not settings["adapters"]:
        return f"seed {settings['seed']}"
    strengths = ", ".join(f"{name} {strength:g}" for name, strength in settings["adapters"].items())
    return f"{strengths} · seed {settings['seed']}"


def describe(settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Settings as (name, value) for people."""
    lines = [("prompt", settings["prompt"])]
    if settings["negative_prompt"]:
        lines.append(("without", settings["negative_prompt"]))
    strengths = ", ".join(f"{name} at {strength:g}" for name, strength in settings["adapters"].items())
    return lines + [
        ("adapters", strengths or "none"),
        ("base", settings["base_model"]),
        ("seed", str(settings["seed"])),
        ("steps", str(settings["num_inference_steps"])),
        ("guidance", f"{settings['guidance_scale']:g}"),
        ("size", f"{settings['width']} × {settings['height']}"),
        *((label, str(settings[name])) for name, (_, label) in UNUSUAL.items() if name in settings),
        *([("begun with", f"a picture, painted anew to {settings['strength']:g}")] if settings.get("strength") else []),
    ]
