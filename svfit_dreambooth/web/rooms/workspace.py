"""Where the web page keeps its things: one folder for the app, in it one for every visitor.

Nothing that a browser sends is used as a path: visitors are known by a random word of fixed form, and files get names
of our own.
"""

import hashlib
import ipaddress
import os
import re
import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from svfit_dreambooth.errors import SVFitError

MAX_ADAPTER_BYTES = 64 * 2**20  # Stable Diffusion XL at full rank in float32 needs 2 MB
SERVED_SECONDS = 7 * 24 * 3600  # for which the web server hands out what nobody asks for again
COOKIE = "svfit_visitor"  # in which a browser keeps its word
WORD = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Workspace:
    """The app's folder.  `shared`: its library and its runs belong to whoever opens the page on this computer."""

    folder: Path
    shared: bool = True

    def visitor(self, word: str, person: str = "") -> "Visitor":
        """The visitor with that secret word, made if new.  Raises SVFitError for a word of another form."""
        if not WORD.fullmatch(word):
            raise SVFitError("this browser sent no valid visitor: reload the page.")
        return Visitor(self, word, "" if self.shared else person or word)

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
    person: str = ""  # whom limits meet: an account or a network, since words cost nothing; "" on a computer's own page

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


def network(client: tuple[str, int] | None) -> str:
    """Where a request comes from, for limits: its address; of version 6 the half that a household shares."""
    try:
        address = ipaddress.ip_address(client[0] if client else "")
    except ValueError:
        return ""
    if address.version == 6 and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)


def serve(workspace: Workspace, path: Path, name: str | None = None) -> str:
    """A copy of `path` (a link where the disk can) that the web server may hand out, called `name`."""
    stat = path.stat()
    key = f"{secret(workspace)} {path} {stat.st_mtime_ns} {stat.st_size}"
    target = workspace.served / hashlib.sha256(key.encode()).hexdigest()[:32] / (name or path.name)
    if target.exists():
        # changes nothing but its ctime, which tells `empty_served` that it was asked for
        with suppress(OSError):  # not ours to change on some disks
            target.chmod(stat.st_mode & 0o777)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(4)}.tmp")
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.replace(target)
    return str(target)


def place_to_serve(workspace: Workspace, name: str) -> Path:
    """Where a file called `name` may be written for the web server to hand out, and for nothing else."""
    folder = workspace.served / secrets.token_hex(16)
    folder.mkdir(parents=True)
    return folder / name


def empty_served(workspace: Workspace) -> None:
    """Removes what nobody has asked for lately: uploads, and copies of what may be deleted by now."""
    for folder, _, names in os.walk(workspace.served):
        for path in (Path(folder, name) for name in names):
            with suppress(OSError):  # gone meanwhile
                if time.time() - path.stat().st_ctime > SERVED_SECONDS:
                    path.unlink()
                    if path.parent != workspace.served:
                        path.parent.rmdir()  # where it was the last


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
