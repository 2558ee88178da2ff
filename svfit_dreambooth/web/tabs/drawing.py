"""Pictures in an editor, and what is drawn over them: a mask."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.base import server
from PIL import Image, ImageChops

from svfit_dreambooth.web.rooms.laid_out import mask

COLOUR = "#4f46e5"
SIDE = 512  # pixels of the longer side of a photo on which is drawn
LARGEST = 2048  # pixels of a side of what comes out of an editor: more than any base paints
MOST_PIXELS = 2**26  # of what is opened to become that
MOST_LAYERS = 8
MOST_BYTES = 2**28  # of drawings that were sent and not asked for yet


def canvas(**options: Any) -> gr.ImageEditor:
    """An editor whose pictures are never large in memory, whatever a browser or a program sends.

    Gradio's own methods give way on the one editor: for a class derived from its own Gradio writes a file beside the code.
    """
    editor: Any = gr.ImageEditor(type="pil", layers=False, buttons=[], **options)
    accept, preprocess, held = editor.accept_blobs, editor.preprocess, editor.blob_storage

    def accept_blobs(data: Any) -> None:
        """Keeps what a browser sends of a drawing until its event asks for it; of those that none asks for, the latest."""
        if str(data.data["index"] or "null") not in ("null", *map(str, range(MOST_LAYERS))):
            raise gr.Error(f"a drawing has at most {MOST_LAYERS} layers.", print_exception=False)
        accept(data)
        while len(held) > 1 and sum(map(_bytes, held.values())) > MOST_BYTES:
            held.pop(next(iter(held)))

    def read(payload: Any) -> Any:
        if payload is not None and payload.id is not None and payload.id not in held:  # which would be taken for none
            raise gr.Error("the picture did not arrive whole: choose or draw it again.", print_exception=False)
        return preprocess(payload)

    editor.accept_blobs, editor.preprocess, editor.convert_and_format_image = server(accept_blobs), read, _opened
    return editor


def _opened(file: Any, flatten_on_white: bool = False) -> Image.Image | None:
    """A picture or layer in RGBA, at most `LARGEST` a side.  Raises gr.Error for what is none."""
    if file is None:
        return None
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            picture: Image.Image = Image.open(BytesIO(file) if isinstance(file, bytes) else file.path)
        width, height = picture.size
        if small := width * height <= MOST_PIXELS:
            picture.draft(None, (LARGEST, LARGEST))
            picture = picture.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise gr.Error("what was sent is no readable picture: choose another one.", print_exception=False) from None
    if not small:
        raise gr.Error(f"the picture has {width} × {height} pixels: scale it down first.", print_exception=False)
    picture.thumbnail((LARGEST, LARGEST), reducing_gap=2.0)
    return picture


def _bytes(sent: Any) -> int:
    """Of what was sent of a drawing."""
    return sum(len(part) for part in (sent.background, sent.composite, *sent.layers) if part is not None)


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
