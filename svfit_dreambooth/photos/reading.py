"""A folder of photos, with captions and masks if there are any."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos.captions import Captions, folder_words, read_captions, read_table
from svfit_dreambooth.photos.decoding import PICTURE_SUFFIXES, decode, open_photo
from svfit_dreambooth.photos.masks import masked_stem, masks_of, read_mask

__all__ = ["Photo", "find_photos", "open_mask", "open_photo", "photo_report"]

logger = logging.getLogger("svfit_dreambooth")

# Files that lie beside photos and are no mistake: not opened, not warned about.
QUIET_SUFFIXES = {
    *(".txt", ".caption", ".json", ".jsonl", ".md", ".yaml", ".yml", ".csv", ".xml", ".html", ".ini", ".db"),
    *(".xmp", ".aae", ".npz", ".toml"),
}


@dataclass(frozen=True)
class Photo:
    """A file that opens as a picture."""

    path: Path
    captions: Captions  # alternatives, one of which is drawn each time; none: train with the instance prompt
    size: tuple[int, int]  # width, height, upright
    mask: Path | None = None  # a file of its own, or the photo itself where its alpha channel is it; None: no mask
    repeats: int = 1  # how often it is shown for every time that one of 1 is


def find_photos(folder: str | Path, may_be_empty: bool = False) -> list[Photo]:
    """The photos of `folder`, sorted by name.

    JPEG, PNG, WebP, BMP, GIF, TIFF, HEIC and AVIF, told by their content; of animated ones the first frame.  Hidden
    files are left out, and sub-folders (with a logged notice if one holds pictures) unless they are named as kohya's
    scripts want it, see captions.py.  A file that doesn't open whole is named in a logged warning and skipped, so is a
    copy pointed out.  Text, JSON and the like are passed over silently.

    Captions: see captions.py.  photo.mask.png beside photo.jpg, or else an alpha channel that isn't opaque everywhere,
    is its mask: see `open_mask`.
    Raises SVFitError when `folder` isn't one, holds no usable photo (unless `may_be_empty`), a caption isn't UTF-8, or
    a mask doesn't fit.
    """
    folder = Path(folder)
    if not folder.exists():
        raise SVFitError(f"There is no folder '{folder}': check the path of your photos.")
    if not folder.is_dir():
        raise SVFitError(f"'{folder}' is a file: name the folder that holds the photos.")
    entries = _entries(folder)
    holding = [path for path in entries if path.is_dir() and _holds_pictures(path)]
    named = [path for path in holding if folder_words(path)]
    unread = [path.name for path in holding if path not in named]
    if unread:
        logger.warning("Sub-folders are not searched; these hold pictures: %s.", ", ".join(unread))
    photos = _photos(folder, entries)
    for path in named:
        repeats, words = folder_words(path) or (1, "")
        photos += [
            Photo(photo.path, photo.captions or (words,), photo.size, photo.mask, repeats)
            for photo in _photos(path, _entries(path))
        ]
    first_seen: dict[bytes, str] = {}
    for photo in photos:
        twin = first_seen.setdefault(hashlib.sha256(photo.path.read_bytes()).digest(), photo.path.name)
        if twin != photo.path.name:
            logger.warning("'%s' is a copy of '%s': both are used, so it counts twice.", photo.path.name, twin)
    if not photos and not may_be_empty:
        count = "1 entry" if len(entries) == 1 else f"{len(entries)} entries"
        found = f"{count}, but no usable photo" if entries else "nothing"
        hint = f"name one of its sub-folders ({', '.join(unread)})" if unread else "put 3 to 10 photos there"
        raise SVFitError(f"'{folder}' holds {found}: {hint}, JPEG, PNG or WebP.")
    return photos


def _photos(folder: Path, entries: list[Path]) -> list[Photo]:
    """Those that lie in `folder` itself."""
    files = [path for path in entries if not path.is_dir()]
    by_name = {path.name.lower(): path for path in files}
    table = read_table(folder)
    masks = [path for path in files if masked_stem(path) is not None]
    used: list[Path] = []
    photos: list[Photo] = []
    for path in files:
        if path.suffix.lower() in QUIET_SUFFIXES or path in masks:
            continue
        try:
            decoded = decode(path)
        except SVFitError as error:
            logger.warning("Skipped: %s", error)
            continue
        for remark in decoded.remarks:
            logger.warning(remark)
        own = masks_of(path, masks)
        used += own
        if len(own) > 1:
            names = ", ".join(mask.name for mask in own[1:])
            logger.warning("'%s' has several masks: %s is used, not %s.", path.name, own[0].name, names)
        mask = own[0] if own else path if decoded.alpha is not None else None
        photo = Photo(path, read_captions(path, by_name, table), decoded.colours.size, mask)
        open_mask(photo)  # raises now what it would raise later
        photos.append(photo)
    for path in masks:
        if path not in used:
            logger.warning(
                "'%s' is the mask of no photo, and no photo by its name: give it its photo's name, or another.",
                path.name,
            )
    return photos


def open_mask(photo: Photo) -> Image.Image | None:
    """Where the subject is in `photo`: see `read_mask`; None: it has no mask."""
    return None if photo.mask is None else read_mask(photo.mask, photo.path, photo.size)


def photo_report(photos: list[Photo], resolution: int) -> list[str]:
    """What a person should know about the photos before training, in plain lines."""
    by_area = sorted(photos, key=lambda photo: photo.size[0] * photo.size[1])
    small = [photo for photo in photos if min(photo.size) < resolution]
    captioned = sum(bool(photo.captions) for photo in photos)
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
    several = sum(len(photo.captions) > 1 for photo in photos)
    if several:
        lines[-1] += f", several each of {several}"
    repeats = sorted({photo.repeats for photo in photos})
    if len(repeats) > 1:
        counts = ", ".join(f"{sum(photo.repeats == n for photo in photos)} counted {n} times" for n in repeats)
        lines.append(f"repeats by folder: {counts}")
    masked = sum(photo.mask is not None for photo in photos)
    if masked:
        lines.append(f"masks: {masked} of {len(photos)}")
    return lines


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _holds_pictures(folder: Path) -> bool:
    try:
        return any(path.suffix.lower() in PICTURE_SUFFIXES and path.name[0] != "." for path in folder.iterdir())
    except OSError:
        return False


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted((path for path in folder.iterdir() if path.name[0] != "."), key=lambda path: path.name)
    except OSError as error:
        raise SVFitError(f"'{folder}' can't be listed ({error.strerror}): check its permissions.") from None
