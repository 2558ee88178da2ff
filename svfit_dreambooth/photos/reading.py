"""A folder of photos, with captions and masks if there are any.

Colour profiles are not applied: values are taken as sRGB, as diffusers' training scripts do.
"""

import hashlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageChops, ImageOps

from svfit_dreambooth.errors import SVFitError

logger = logging.getLogger("svfit_dreambooth")

# What Pillow may try, by content.  Not everything it knows: opening EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif"}
# Files that lie beside photos and are no mistake: not opened, not warned about.
QUIET_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".md", ".yaml", ".yml", ".csv", ".xml", ".html", ".ini", ".db"}

MASK = ".mask"  # photo.mask.png is no photo, it says where the subject is in photo.jpg

T = TypeVar("T")


@dataclass(frozen=True)
class Photo:
    """A file that opens as a picture."""

    path: Path
    caption: str | None  # from photo.txt beside photo.jpg; None: train with the instance prompt
    size: tuple[int, int]  # width, height, upright
    mask: Path | None = None  # photo.mask.png, or the photo itself where its alpha channel is the mask; None: no mask


def find_photos(folder: str | Path, may_be_empty: bool = False) -> list[Photo]:
    """The photos of `folder`, sorted by name.

    JPEG, PNG, WebP, BMP, GIF and TIFF, told by their content; of animated ones the first frame.  Hidden files and
    sub-folders are left out (with a logged notice if a sub-folder holds pictures).  A file that doesn't open whole is
    named in a logged warning and skipped, so is a copy pointed out.  Text, JSON and the like are passed over silently.

    photo.txt beside photo.jpg is its caption; photo.mask.png, or else an alpha channel that isn't opaque everywhere, is
    its mask: see `open_mask`.
    Raises SVFitError when `folder` isn't one, holds no usable photo (unless `may_be_empty`), a caption isn't UTF-8, or
    a mask doesn't fit.
    """
    folder = Path(folder)
    if not folder.exists():
        raise SVFitError(f"There is no folder '{folder}': check the path of your photos.")
    if not folder.is_dir():
        raise SVFitError(f"'{folder}' is a file: name the folder that holds the photos.")
    try:
        entries = sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: path.name)
    except OSError as error:
        raise SVFitError(f"'{folder}' can't be listed ({error.strerror}): check its permissions.") from None
    subfolders = [path.name for path in entries if path.is_dir() and _holds_pictures(path)]
    if subfolders:
        logger.warning("Sub-folders are not searched; these hold pictures: %s.", ", ".join(subfolders))

    masks = {path.stem.removesuffix(MASK): path for path in entries if path.stem.endswith(MASK) and _is_picture(path)}
    photos: list[Photo] = []
    first_seen: dict[bytes, str] = {}
    for path in entries:
        if path.is_dir() or path.suffix.lower() in QUIET_SUFFIXES or path in masks.values():
            continue
        try:
            size, transparent = _open(path, lambda image: (_to_rgb(image).size, _alpha(image) is not None))
        except SVFitError as error:
            logger.warning("Skipped: %s", error)
            continue
        twin = first_seen.setdefault(hashlib.sha256(path.read_bytes()).digest(), path.name)
        if twin != path.name:
            logger.warning("'%s' is a copy of '%s': both are used, so it counts twice.", path.name, twin)
        photo = Photo(path, _caption(path), size, masks.get(path.stem, path if transparent else None))
        open_mask(photo)  # raises now what it would raise later
        photos.append(photo)
    for path in masks.values():
        if path not in [photo.mask for photo in photos]:
            logger.warning("'%s' is the mask of no photo: name it like its photo.", path.name)
    if not photos and not may_be_empty:
        count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
        found = f"{count}, but no usable photo" if entries else "nothing"
        hint = f"name one of its sub-folders ({', '.join(subfolders)})" if subfolders else "put 3 to 10 photos there"
        raise SVFitError(f"'{folder}' holds {found}: {hint}, JPEG, PNG or WebP.")
    return photos


def open_photo(path: str | Path, keep_alpha: bool = False) -> Image.Image:
    """An RGB picture, upright (EXIF), transparency laid on white, 16-bit values scaled to 8; of several, the first.

    `keep_alpha`: one that isn't opaque everywhere stays RGBA.
    Raises SVFitError for a file that isn't a picture, is broken or cut short, or has more pixels than is safe to open
    (twice PIL.Image.MAX_IMAGE_PIXELS, 179 million).
    """
    return _open(Path(path), _to_rgb_or_rgba if keep_alpha else _to_rgb)


def open_mask(photo: Photo) -> Image.Image | None:
    """Where the subject is in `photo`: a picture of the photo's size, mode "L", white for the subject; None: no mask.

    It comes from `photo.mask`: of a file of its own the brightness counts, and of what is transparent there nothing;
    of the photo itself the alpha channel.
    Raises SVFitError for a mask of other proportions than its photo, and for one that is black everywhere.
    """
    if photo.mask is None:
        return None
    mask = _open(photo.mask, _alpha if photo.mask == photo.path else _brightness)
    if mask is None or mask.getextrema()[1] == 0:
        raise SVFitError(f"The mask '{photo.mask}' is empty, so nothing of the photo would be learnt: correct it.")
    (width, height), (own_width, own_height) = photo.size, mask.size
    if abs(own_width * height - own_height * width) > max(own_width, own_height) * max(width, height) / 100:
        raise SVFitError(
            f"The mask '{photo.mask}' has {_times(mask.size)} pixels and its photo {_times(photo.size)}: "
            "give it the proportions of the photo."
        )
    return mask if mask.size == photo.size else mask.resize(photo.size, Image.Resampling.BILINEAR)


def _open(path: Path, convert: Callable[[Image.Image], T]) -> T:
    """What `convert` makes of the upright picture in `path`."""
    if not path.is_file():
        raise SVFitError(f"'{path}' isn't a file: check the path of the photo.")
    Image.init()  # all plugins: with `formats` given, Pillow doesn't look for those it hasn't loaded yet
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # phones do take 100-megapixel photos
            warnings.filterwarnings("ignore", "Corrupt EXIF data")
            with Image.open(path, formats=FORMATS) as image:
                image.verify()  # checksums, where the format has them
            with Image.open(path, formats=FORMATS) as image:
                image.load()
                return convert(_upright(image, path))
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise SVFitError(f"'{path}' has more than {limit} pixels, too many to open safely: scale it down.") from None
    except Image.UnidentifiedImageError:
        heic = path.suffix.lower() in (".heic", ".heif")  # what phones write
        kind = "is a HEIC picture, which can't be read here" if heic else "isn't a picture of a known kind"
        raise SVFitError(f"'{path}' {kind}: save it as JPEG, PNG or WebP.") from None
    except MemoryError:
        raise SVFitError(f"'{path}' doesn't fit into memory: scale it down.") from None
    except Exception as error:  # noqa: BLE001 - decoders meet broken files with every kind of exception
        raise SVFitError(f"'{path}' is broken or cut short ({error}): copy it again or remove it.") from None


def photo_report(photos: list[Photo], resolution: int) -> list[str]:
    """What a person should know about the photos before training, in plain lines."""
    by_area = sorted(photos, key=lambda photo: photo.size[0] * photo.size[1])
    small = [photo for photo in photos if min(photo.size) < resolution]
    captioned = sum(photo.caption is not None for photo in photos)
    lines = [f"{len(photos)} photo{'s' * (len(photos) != 1)}"]
    if photos:
        sizes = dict.fromkeys(_times(photo.size) for photo in (by_area[0], by_area[-1]))
        lines[0] += f", {' to '.join(sizes)} pixels"
    if small:
        named = ", ".join(f"{photo.path.name} ({_times(photo.size)})" for photo in small[:5])
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        lines.append(f"smaller than the resolution of {resolution}, will be enlarged: {named}{more}")
    if len(photos) < 3:
        lines.append("few photos: 3 to 10, from different sides and before different backgrounds, work better")
    lines.append(
        f"captions: {captioned} of {len(photos)}" if captioned else "captions: none, the instance prompt is used"
    )
    masked = sum(photo.mask is not None for photo in photos)
    if masked:
        lines.append(f"masks: {masked} of {len(photos)}")
    return lines


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _holds_pictures(folder: Path) -> bool:
    try:
        return any(_is_picture(path) and path.name[0] != "." for path in folder.iterdir())
    except OSError:
        return False


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES


def _caption(path: Path) -> str | None:
    caption_path = path.with_suffix(".txt")
    if not caption_path.is_file():
        return None
    try:
        return caption_path.read_text(encoding="utf-8-sig").strip() or None
    except (UnicodeDecodeError, OSError) as error:
        raise SVFitError(f"The caption '{caption_path}' can't be read ({error}): save it as UTF-8 text.") from None


def _upright(image: Image.Image, path: Path) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # noqa: BLE001 - the picture is whole, only its notes aren't
        logger.warning("'%s' has unreadable EXIF data (%s): its orientation is taken as it is.", path, error)
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip instead of scaling
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else max(float(values.max()), 1.0)  # 16 bit; floats by their range
        image = Image.fromarray(np.clip(values * (255 / top), 0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_rgb_or_rgba(image: Image.Image) -> Image.Image:
    return _to_rgb(image) if _alpha(image) is None else image.convert("RGBA")


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel, unless there is none or it is opaque everywhere."""
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def _brightness(image: Image.Image) -> Image.Image:
    brightness, alpha = _to_rgb(image).convert("L"), _alpha(image)
    return brightness if alpha is None else ImageChops.multiply(brightness, alpha)
