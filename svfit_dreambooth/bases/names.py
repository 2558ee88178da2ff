"""How base models are called, and where the embedded one lies; asks neither torch nor the network."""

import re
from pathlib import Path

from svfit_dreambooth.errors import SVFitError

TOYBOX = "toybox"  # the word by which people ask for the embedded base model, whichever that is
DEFAULT_BASE = "toybox 2"  # what files call the one at hand, which is taken where none is named
FORMER = {"toybox": "the first toybox"}  # embedded ones of earlier versions: name in files -> what people are told

EMBEDDED_WEIGHTS = Path(__file__).resolve().parents[2] / "toybox" / "weights"
SUBJECTS_FOLDER = EMBEDDED_WEIGHTS.parent / "subjects"  # a folder of photos each
DEFAULT_SUBJECT = "dog_patch"  # where no photos are named either

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?")


def base_name(path: Path) -> str:
    """What adapter files and the page call a base model that is a folder or a file, without the folders above it."""
    return path.resolve().stem if path.is_file() else path.name or path.resolve().name


def as_asked(name: str) -> str:
    """What a person's word for a base means: the embedded one at hand, and the home folder for a leading "~"."""
    if name == TOYBOX:
        return DEFAULT_BASE
    return str(Path(name).expanduser()) if name.startswith("~") else name


def spoken(name: str) -> str:
    """What people are told of a base that files call `name`."""
    return FORMER.get(name, name)


def check_held(name: str, what: str) -> None:
    """Raises SVFitError if `what` was made with the base that files call `name`, and its weights are gone for good."""
    if name in FORMER:
        raise SVFitError(
            f"{what} was made with {FORMER[name]}, in whose place this version holds {DEFAULT_BASE}: make it anew, or "
            "use it with the version that made it."
        )


def split_revision(name: str) -> tuple[str, str | None]:
    """The hub id and the revision, None if none is given, of "owner/name[@revision]"; other names stay as they are."""
    match = HUB_ID.fullmatch(name)
    return (match["id"], match["revision"]) if match else (name, None)


def is_hub_id(name: str) -> bool:
    """Whether `name` reads "owner/name", without a revision."""
    match = HUB_ID.fullmatch(name)
    return match is not None and match["revision"] is None


def bundled_subject(base: str, folder: str | Path) -> str | None:
    """The name of the embedded base's own subject whose photos `folder` holds, where `base` is that base."""
    path = Path(folder).resolve()
    return path.name if as_asked(base) == DEFAULT_BASE and path.parent == SUBJECTS_FOLDER.resolve() else None


def subject_kind(subject: str) -> str:
    """What a bundled subject is: "dog" of "dog_patch"."""
    return subject.partition("_")[0]
