"""The photos that a visitor lays out for the next run: what may come in, how they are turned, what is said of them."""

import re
from pathlib import Path

from PIL import Image

from svfit_dreambooth.bases.names import SUBJECTS_FOLDER
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import save_png, write_atomically
from svfit_dreambooth.photos.masks import masked_stem
from svfit_dreambooth.photos.reading import Photo, open_mask, open_photo, photo_report

BUNDLED = ".bundled"  # file beside the photos: the toy whose photos, untouched, they are
MAX_PHOTOS = 100
MAX_PHOTO_BYTES = 50 * 2**20
MAX_SHORT_SIDE = 1536  # pixels: larger photos are scaled down to this, more than any base trains at
THUMBNAIL = 256  # pixels of the longer side of what the page shows of a photo
MAX_CAPTION = 1000  # characters; text encoders read a few hundred
ALIKE = 5  # of 64 bits of the fingerprints of two photos that look the same


def add_photos(folder: Path, uploads: list[Path]) -> list[str]:
    """Puts uploaded photos into `folder`, upright and without their notes (place, camera); returns what is wrong.

    Every file is opened by content; one that is no picture, broken or too large is named and left out.  What is
    transparent stays so: in training it is the mask.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remarks = []
    number = max((int(path.stem) for path in photo_files(folder)), default=0)
    for upload in uploads:
        shown = upload.name
        if len(photo_files(folder)) >= MAX_PHOTOS:
            remarks.append(f"more than {MAX_PHOTOS} photos: {shown} was left out.")
            continue
        if upload.stat().st_size > MAX_PHOTO_BYTES:
            remarks.append(f"{shown} is larger than {MAX_PHOTO_BYTES >> 20} MB: scale it down.")
            continue
        if masked_stem(upload) is not None:
            remarks.append(f"{shown} is a mask: make what is not the subject transparent in the photo itself instead.")
            continue
        try:
            photo = open_photo(upload, keep_alpha=True)
            open_mask(_as_photo(upload, photo))  # refuses now what the run would refuse
        except SVFitError as error:
            remarks.append(str(error).replace(str(upload), shown))
            continue
        number += 1
        if (short := min(photo.size)) > MAX_SHORT_SIDE:
            photo = photo.resize(
                (round(photo.width * MAX_SHORT_SIDE / short), round(photo.height * MAX_SHORT_SIDE / short)),
                Image.Resampling.LANCZOS,
                reducing_gap=2.0,  # of a very large one, whole pixels are averaged first
            )
        save_png(photo, folder / f"{number:03d}.png", compress_level=1)
    return remarks


def _as_photo(path: Path, photo: Image.Image) -> Photo:
    """What a run will make of the opened `photo`: one with an alpha channel is its own mask."""
    return Photo(path, (), photo.size, path if photo.mode == "RGBA" else None)


def photo_files(folder: Path) -> list[Path]:
    """The photos laid out in `folder`, in order."""
    return sorted(folder.glob("[0-9][0-9][0-9].png"))


def rotate_photo(path: Path) -> None:
    """A quarter turn to the right."""
    with Image.open(path) as photo:
        save_png(photo.transpose(Image.Transpose.ROTATE_270), path, compress_level=1)


def remove_photo(path: Path) -> None:
    path.unlink()
    for beside in (_thumbnail_of(path), caption_file(path)):
        beside.unlink(missing_ok=True)


def caption_file(path: Path) -> Path:
    """Where a caption of the photo `path` stands, as photos/captions.py reads it."""
    return path.with_suffix(".txt")


def caption(path: Path) -> str:
    """What is said of the photo `path`; "" where nothing is, and the run's prompt holds."""
    try:
        return caption_file(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def set_caption(path: Path, text: str) -> None:
    """Says `text` of the photo `path`; nothing: the run's prompt holds.  Raises SVFitError for one that is too long."""
    text = " ".join(text.split())
    if len(text) > MAX_CAPTION:
        raise SVFitError(f"the caption has {len(text):,} characters: {MAX_CAPTION} are the most.")
    if text:
        write_atomically(caption_file(path), text)
    else:
        caption_file(path).unlink(missing_ok=True)


def mask(path: Path) -> Image.Image | None:
    """Where the subject is on the photo `path`, white, by its transparency; None: everywhere."""
    with Image.open(path) as photo:
        return photo.getchannel("A") if photo.mode == "RGBA" else None


def set_mask(path: Path, subject: Image.Image | None) -> None:
    """Makes transparent what is not white in `subject`; None, or black everywhere: nothing is, and all of it is trained."""
    with Image.open(path) as photo:
        whole = photo.convert("RGB")
    if subject is not None and subject.getbbox() is not None:
        whole.putalpha(subject.convert("L").resize(whole.size, Image.Resampling.NEAREST))
    save_png(whole, path, compress_level=1)


def remove_photos(folder: Path) -> None:
    for path in photo_files(folder):
        remove_photo(path)
    touched(folder)


def bundled_subjects() -> list[str]:
    """Names of the toys whose photos come with the embedded base."""
    return sorted(path.name for path in SUBJECTS_FOLDER.glob("*") if re.fullmatch(r"\w+", path.name))


def take_bundled(folder: Path, subject: str) -> None:
    """The photos of a toy, in place of what was there."""
    remove_photos(folder)
    add_photos(folder, sorted((SUBJECTS_FOLDER / subject).glob("*.png")))
    (folder / BUNDLED).write_text(subject, encoding="utf-8")


def bundled(folder: Path) -> str | None:
    """The toy whose photos, untouched, are in the folder."""
    try:
        subject = (folder / BUNDLED).read_text(encoding="utf-8")
    except OSError:
        return None
    return subject if subject in bundled_subjects() else None


def touched(folder: Path) -> None:
    """Notes that the photos are not, or not only, those of a toy."""
    (folder / BUNDLED).unlink(missing_ok=True)


def thumbnail(path: Path) -> Path:
    """A small picture of the photo `path`, made anew when the photo has changed."""
    small = _thumbnail_of(path)
    if not small.is_file() or small.stat().st_mtime_ns < path.stat().st_mtime_ns:
        save_thumbnail(path, small)
    return small


def save_thumbnail(path: Path, small: Path) -> None:
    with Image.open(path) as photo:
        photo.thumbnail((THUMBNAIL, THUMBNAIL), reducing_gap=2.0)
        save_png(photo, small, compress_level=1)


def _thumbnail_of(path: Path) -> Path:
    return path.with_name(f".small-{path.name}")


def photo_remarks(folder: Path, resolution: int) -> list[str]:
    """What a person should know about the photos laid out, in plain lines."""
    paths = photo_files(folder)
    if not paths:
        return []
    photos, prints = [], []
    for path in paths:
        with Image.open(path) as photo:
            photos.append(_as_photo(path, photo))
            prints.append(_look(photo))
    names = {path.name: f"photo {i}" for i, path in enumerate(paths, 1)}
    lines = [line for line in photo_report(photos, resolution) if not line.startswith("captions")]
    for name, shown in names.items():
        lines = [line.replace(name, shown) for line in lines]
    for j, later in enumerate(prints):
        for i, earlier in enumerate(prints[:j]):
            if (later ^ earlier).bit_count() <= ALIKE:
                lines.append(f"photo {j + 1} looks like photo {i + 1}: remove one, it would count twice")
                break
    if len(photos) > 30:
        lines.append("many photos: the best 5 to 15 are usually enough")
    return lines


def _look(photo: Image.Image) -> int:
    """64 bits that change little when a photo is scaled or compressed: is a point brighter than its neighbour?"""
    small = photo.convert("RGB").resize((9, 8), Image.Resampling.BOX).convert("L").tobytes()
    bits = 0
    for row in range(8):
        for column in range(8):
            bits = bits * 2 + (small[row * 9 + column] > small[row * 9 + column + 1])
    return bits
