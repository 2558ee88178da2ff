"""Masks: where the subject is in a photo, from a file beside it or from the photo's own alpha channel."""

from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageChops

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos.decoding import PICTURE_SUFFIXES, decode

# photo.mask.png is no photo, it says where the subject is in photo.jpg; the others are other programs' names for it.
ENDINGS = (".mask", "_mask", "-mask", "-masklabel", "_masklabel", ".masklabel")


def masked_stem(path: Path) -> str | None:
    """The photo's part of the name of a mask, "photo" for photo.mask.png and photo_MASK.png; None: it is no mask."""
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        return None
    for ending in ENDINGS:
        if path.stem.lower().endswith(ending):
            return path.stem[: -len(ending)]
    return None


def masks_of(photo: Path, masks: Iterable[Path]) -> list[Path]:
    """Those of `masks` that belong to `photo`: to its name with or without its suffix, in large or small letters."""
    names = (photo.stem.casefold(), photo.name.casefold())
    return [mask for mask in masks if (masked_stem(mask) or "").casefold() in names]


def read_mask(path: Path, photo: Path, size: tuple[int, int]) -> Image.Image:
    """Where the subject is: of `size`, mode "L", white for the subject.

    Of a file of its own the brightness counts, and of what is transparent there nothing; of the `photo` itself the
    alpha channel.  Raises SVFitError for a mask of other proportions than its photo, and for one that is black
    everywhere.
    """
    decoded = decode(path)
    mask = decoded.alpha
    if path != photo:
        mask = decoded.on_white().convert("L")
        mask = mask if decoded.alpha is None else ImageChops.multiply(mask, decoded.alpha)
    if mask is None or mask.getextrema()[1] == 0:
        raise SVFitError(f"The mask '{path}' is empty, so nothing of the photo would be learnt: correct it.")
    (width, height), (own_width, own_height) = size, mask.size
    if abs(own_width * height - own_height * width) > max(own_width, own_height) * max(width, height) / 100:
        raise SVFitError(
            f"The mask '{path}' has {own_width}x{own_height} pixels and its photo {width}x{height}: "
            "give it the proportions of the photo."
        )
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)
