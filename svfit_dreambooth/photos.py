"""A folder of photos, with captions if there are any, to training examples.

Everything about a photo's examples follows from the photo, its name and the seed: other photos in the folder don't
matter.  Colour profiles are not applied: values are taken as sRGB, as diffusers' training scripts do.
"""

import hashlib
import logging
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from svfit_dreambooth.errors import SVFitError

logger = logging.getLogger("svfit_dreambooth")

# What Pillow may try, by content.  Not everything it knows: opening EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif"}
# Files that lie beside photos and are no mistake: not opened, not warned about.
QUIET_SUFFIXES = {".txt", ".caption", ".json", ".jsonl", ".md", ".yaml", ".yml", ".csv", ".xml", ".html", ".ini", ".db"}

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the upright photo


@dataclass(frozen=True)
class Photo:
    """A file that opens as a picture."""

    path: Path
    caption: str | None  # from photo.txt beside photo.jpg; None: train with the instance prompt
    size: tuple[int, int]  # width, height, upright


def find_photos(folder: str | Path) -> list[Photo]:
    """The photos of `folder`, sorted by name.

    JPEG, PNG, WebP, BMP, GIF and TIFF, told by their content; of animated ones the first frame.  Hidden files and
    sub-folders are left out (with a logged notice if a sub-folder holds pictures).  A file that doesn't open whole is
    named in a logged warning and skipped, so is a copy pointed out.  Text, JSON and the like are passed over silently.

    Raises SVFitError when `folder` isn't one, holds no usable photo, or a caption isn't UTF-8.
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

    photos: list[Photo] = []
    first_seen: dict[bytes, str] = {}
    for path in entries:
        if path.is_dir() or path.suffix.lower() in QUIET_SUFFIXES:
            continue
        try:
            size = open_photo(path).size
        except SVFitError as error:
            logger.warning("Skipped: %s", error)
            continue
        twin = first_seen.setdefault(hashlib.sha256(path.read_bytes()).digest(), path.name)
        if twin != path.name:
            logger.warning("'%s' is a copy of '%s': both are used, so it counts twice.", path.name, twin)
        photos.append(Photo(path, _caption(path), size))
    if not photos:
        found = f"{len(entries)} entries, but no usable photo" if entries else "nothing"
        hint = f"name one of its sub-folders ({', '.join(subfolders)})" if subfolders else "put 3 to 10 photos there"
        raise SVFitError(f"'{folder}' holds {found}: {hint}, JPEG, PNG or WebP.")
    return photos


def open_photo(path: str | Path) -> Image.Image:
    """An RGB picture, upright (EXIF), transparency laid on white, 16-bit values scaled to 8; of several, the first.

    Raises SVFitError for a file that isn't a picture, is broken or cut short, or has more pixels than is safe to open
    (twice PIL.Image.MAX_IMAGE_PIXELS, 179 million).
    """
    path = Path(path)
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
                return _to_rgb(_upright(image, path))
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise SVFitError(f"'{path}' has more than {limit} pixels, too many to open safely: scale it down.") from None
    except Image.UnidentifiedImageError:
        raise SVFitError(f"'{path}' isn't a picture of a known kind: save it as JPEG, PNG or WebP.") from None
    except MemoryError:
        raise SVFitError(f"'{path}' doesn't fit into memory: scale it down.") from None
    except Exception as error:  # noqa: BLE001 - decoders meet broken files with every kind of exception
        raise SVFitError(f"'{path}' is broken or cut short ({error}): copy it again or remove it.") from None


def crop_boxes(size: tuple[int, int], center_crop: bool, count: int, seed: int) -> list[Box]:
    """Square windows as large as the shorter side, to be scaled to the resolution.

    center_crop: one, in the middle, whatever `count`.  Otherwise `count` of them along the longer side, placed
    uniformly at random, fixed by `seed`.
    """
    if count < 1:
        raise SVFitError(f"{count} crops a photo can't be taken: ask for 1 or more.")
    width, height = size
    side = min(width, height)
    slack = max(width, height) - side
    random = np.random.default_rng(seed % 2**64)
    offsets = [slack // 2] if center_crop else random.integers(0, slack, size=count, endpoint=True).tolist()
    corners = [(offset, 0) if width > height else (0, offset) for offset in offsets]
    return [(left, top, left + side, top + side) for left, top in corners]


def examples(
    image: Image.Image,
    resolution: int,
    center_crop: bool = False,
    random_flip: bool = False,
    crops: int = 1,
    seed: int = 0,
    index: int | str = 0,
) -> torch.Tensor:
    """Training examples of one photo, (variants, 3, resolution, resolution), float32 in [-1, 1].

    random_flip: each crop is followed by its mirror image: variants are ordered (crop, flip).
    index: tells photos apart, so that equal sizes don't get equal crops; give the file's name and the result doesn't
    depend on which other photos there are.
    Raises SVFitError for a resolution or a number of crops below 1.
    """
    if resolution < 1:
        raise SVFitError(f"The resolution {resolution} isn't possible: it is in pixels, such as 512.")
    photo_seed = zlib.crc32(f"{seed} {index}".encode(errors="surrogatepass"))
    variants = []
    for box in crop_boxes(image.size, center_crop, crops, photo_seed):
        square = image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)
        pixels = torch.from_numpy(np.array(square, dtype=np.float32))  # (resolution, resolution, 3), 0..255
        pixels = (pixels / 127.5 - 1).permute(2, 0, 1)  # (3, resolution, resolution), -1..1
        variants += [pixels, pixels.flip(-1)] if random_flip else [pixels]
    return torch.stack(variants)  # (variants, 3, resolution, resolution)


def photo_report(photos: list[Photo], resolution: int) -> list[str]:
    """What a person should know about the photos before training, in plain lines."""
    by_area = sorted(photos, key=lambda photo: photo.size[0] * photo.size[1])
    small = [photo for photo in photos if min(photo.size) < resolution]
    captioned = sum(photo.caption is not None for photo in photos)
    lines = [f"{len(photos)} photo{'s' * (len(photos) != 1)}"]
    if photos:
        lines[0] += f", {_times(by_area[0].size)} to {_times(by_area[-1].size)} pixels" if len(photos) > 1 else ""
        lines[0] += f", {_times(photos[0].size)} pixels" if len(photos) == 1 else ""
    if small:
        named = ", ".join(f"{photo.path.name} ({_times(photo.size)})" for photo in small[:5])
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        lines.append(f"smaller than the resolution of {resolution}, will be enlarged: {named}{more}")
    if len(photos) < 3:
        lines.append("few photos: 3 to 10, from different sides and before different backgrounds, work better")
    lines.append(
        f"captions: {captioned} of {len(photos)}" if captioned else "captions: none, the instance prompt is used"
    )
    return lines


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _holds_pictures(folder: Path) -> bool:
    try:
        return any(p.suffix.lower() in PICTURE_SUFFIXES and p.name[0] != "." for p in folder.iterdir())
    except OSError:
        return False


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
