"""What is drawn over a picture in an editor: a mask."""

from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from svfit_dreambooth.web.rooms.laid_out import mask

COLOUR = "#4f46e5"
SIDE = 512  # pixels of the longer side of a photo on which is drawn


def to_draw_on(path: Path) -> dict[str, Any]:
    """The photo `path`, dark where its mask leaves it out, as an editor takes it."""
    with Image.open(path) as photo:
        scale = SIDE / max(photo.size)
        size = (round(photo.width * scale), round(photo.height * scale))
        shown = photo.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    held = mask(path)
    if held is not None:  # as part of the picture: an editor that is given a layer takes no strokes
        shown = Image.composite(shown, shown.point(lambda value: value // 4), held.resize(size))
    return {"background": shown, "layers": [], "composite": None}


def drawn_over(drawn: dict[str, Any] | None) -> Image.Image | None:
    """White where something is drawn in the layers of an editor; None where nothing is."""
    found = None
    for layer in (drawn or {}).get("layers") or []:
        alpha = layer.getchannel("A").point(lambda value: 255 if value else 0)
        found = alpha if found is None else ImageChops.lighter(found, alpha)
    return found if found is not None and found.getbbox() is not None else None
