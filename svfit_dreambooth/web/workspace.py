"""Where the web page keeps its things, and what may come in: one folder for the app, in it one for every visitor.

Nothing that a browser sends is used as a path: visitors are known by a random word of fixed form, files get names of
our own, and contents are looked at before they are kept.
"""

import hashlib
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import save_png
from svfit_dreambooth.photos import Photo, open_photo, photo_report

MAX_PHOTOS = 100
MAX_PHOTO_BYTES = 50 * 2**20
MAX_SHORT_SIDE = 1536  # pixels: larger photos are scaled down to this, more than any base trains at
THUMBNAIL = 256  # pixels of the longer side of what the page shows of a photo
MAX_ADAPTER_BYTES = 64 * 2**20  # Stable Diffusion XL at full rank in float32 needs 2 MB
MAX_NAME = 60  # characters of a name that a person gives
ALIKE = 5  # of 64 bits of the fingerprints of two photos that look the same
WORD = re.compile(r"[0-9a-f]{32}")


def default_data_dir() -> Path:
    """$SVFIT_HOME, else the user's data folder."""
    if home := os.environ.get("SVFIT_HOME"):
        return Path(home)
    base = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(base) / "svfit-dreambooth"


@dataclass(frozen=True)
class Workspace:
    """The app's folder.  `shared`: its library and its runs belong to whoever opens the page on this computer."""

    folder: Path
    shared: bool = True

    def visitor(self, word: str) -> "Visitor":
        """The visitor with that secret word, made if new.  Raises SVFitError for a word of another form."""
        if not WORD.fullmatch(word):
            raise SVFitError("this browser sent no valid visitor: reload the page.")
        return Visitor(self, word)

    @property
    def models(self) -> Path:
        """Folders and .safetensors checkpoints that are offered as base models."""
        return self.folder / "models"

    @property
    def jobs(self) -> Path:
        return self.folder / "jobs"

    @property
    def served(self) -> Path:
        """The only folder whose files the web server hands out, each under an unguessable name."""
        return self.folder / "served"


@dataclass(frozen=True)
class Visitor:
    """One browser, or one account where there are passwords: photos and pictures are seen by nobody else."""

    workspace: Workspace
    word: str

    @property
    def folder(self) -> Path:
        return self.workspace.folder / "visitors" / self.word

    @property
    def photos(self) -> Path:
        """Photos laid out for the next run."""
        return self.folder / "photos"

    @property
    def pictures(self) -> Path:
        return self.folder / "pictures"

    @property
    def library(self) -> Path:
        """The adapters: the computer's own, or the visitor's where strangers share the page."""
        return (self.workspace.folder if self.workspace.shared else self.folder) / "adapters"

    @property
    def uploads(self) -> Path:
        """Adapters uploaded for this visitor's pictures only."""
        return self.folder / "uploads"

    @property
    def owner(self) -> str:
        """Whose runs these are; equal for all visitors of a computer's own page."""
        return "" if self.workspace.shared else self.word


def library_of(workspace: Workspace, owner: str) -> Path:
    """Where the results of an owner's runs go."""
    return Visitor(workspace, owner).library if owner else workspace.folder / "adapters"


def word_for(name: str) -> str:
    """The word of an account or of a client without cookies."""
    return hashlib.sha256(f"svfit visitor {name}".encode()).hexdigest()[:32]


def file_name(text: str, kind: str = "name") -> str:
    """`text` as the name of a file: letters, digits, '-', '_' and '.'.  Raises SVFitError if nothing is left."""
    name = re.sub(r"[^\w.-]+", "-", text.strip()).strip("-.")[:MAX_NAME].strip("-.")
    if not name:
        raise SVFitError(f"the {kind} {text!r} has no letters or digits: give one, such as my-dog.")
    return name


def serve(workspace: Workspace, path: Path, name: str | None = None) -> str:
    """A copy of `path` (a link where the disk can) that the web server may hand out, called `name`."""
    stat = path.stat()
    key = f"{secret(workspace)} {path} {stat.st_mtime_ns} {stat.st_size}"
    target = workspace.served / hashlib.sha256(key.encode()).hexdigest() / (name or path.name)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(4)}.tmp")
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.replace(target)
    return str(target)


def secret(workspace: Workspace) -> str:
    """A random word of this app folder, kept readable for its owner only."""
    path = workspace.folder / "secret"
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".secret-{secrets.token_hex(4)}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))
    place(temporary, path)  # the first of two servers wins
    return path.read_text(encoding="ascii")


def place(temporary: Path, target: Path) -> bool:
    """Gives the file `temporary` the name `target`; False, and it is gone, if there is such a file already.

    Where the disk knows no links (exFAT, many network and FUSE mounts), it is copied into a new file instead.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:
        return _copy_new(temporary, target)
    finally:
        temporary.unlink()
    return True


def _copy_new(source: Path, target: Path) -> bool:
    """A copy of `source` as the new file `target`; False if there is one already."""
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, source.stat().st_mode & 0o777)
    except FileExistsError:
        return False
    try:
        with open(source, "rb") as original, open(descriptor, "wb") as copy:
            shutil.copyfileobj(original, copy)
    except OSError:
        target.unlink()
        raise
    return True


# ---------------------------------------------------------------- photos laid out for training


def add_photos(folder: Path, uploads: list[Path]) -> list[str]:
    """Puts uploaded photos into `folder`, upright and without their notes (place, camera); returns what is wrong.

    Every file is opened by content; one that is no picture, broken or too large is named and left out.
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
        try:
            photo = open_photo(upload)
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


def photo_files(folder: Path) -> list[Path]:
    """The photos laid out in `folder`, in order."""
    return sorted(folder.glob("[0-9][0-9][0-9].png"))


def rotate_photo(path: Path) -> None:
    """A quarter turn to the right."""
    with Image.open(path) as photo:
        save_png(photo.transpose(Image.Transpose.ROTATE_270), path, compress_level=1)


def remove_photo(path: Path) -> None:
    path.unlink()
    _thumbnail_of(path).unlink(missing_ok=True)


def thumbnail(path: Path) -> Path:
    """A small picture of the photo `path`, made anew when the photo has changed."""
    small = _thumbnail_of(path)
    if not small.is_file() or small.stat().st_mtime_ns < path.stat().st_mtime_ns:
        with Image.open(path) as photo:
            photo.thumbnail((THUMBNAIL, THUMBNAIL), reducing_gap=2.0)
            save_png(photo, small, compress_level=1)
    return small


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
            photos.append(Photo(path, None, photo.size))
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
