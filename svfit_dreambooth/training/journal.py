"""The folder of one training run: what lies where, who may write in it, what has happened, what an earlier run left."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from filelock import FileLock, Timeout

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import TEMPORARY, write_atomically
from svfit_dreambooth.training.events import Event, Start, from_line, to_line

logger = logging.getLogger(__name__)

LORA_KINDS = ("kohya", "diffusers")


class RunFolder:
    """A run's folder by its files' names.

    `adapter_name`: of the run that writes; None, for whoever reads: as the run itself noted it at its start.
    """

    def __init__(self, path: str | Path, adapter_name: str | None = None) -> None:
        self.path = Path(path)
        self._adapter_name = adapter_name
        self.config = self.path / "config.yaml"
        self.progress = self.path / "progress.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.looks = self.path / "validation"
        self.looks_sheet = self.path / "validation.png"
        self.curve = self.path / "curve.png"
        self.logs = self.path / "logs"
        self.class_pictures = self.path / "class_pictures"
        self.encoded = self.path / "encoded"
        self.reserve = self.path / ".reserve"
        self.lock = self.path / ".lock"
        self.earlier = self.path / "earlier"

    @property
    def adapter_name(self) -> str | None:
        """None: no run noted one."""
        if self._adapter_name is None:
            starts = [event for event in self.events() if isinstance(event, Start)]
            return (Path(starts[-1].adapter_name).name or None) if starts else None
        return self._adapter_name

    @property
    def adapter(self) -> Path:
        return self.path / f"{self.adapter_name}.safetensors"

    @property
    def sheet(self) -> Path:
        """The picture at the end: photos, the base's answers, the adapter's."""
        return self.adapter.with_suffix(".png")

    def lora(self, kind: str) -> Path:
        return self.path / f"{self.adapter_name}-{kind}.safetensors"

    def look(self, step: int) -> Path:
        """The pictures of a look, side by side."""
        return self.looks / f"step_{step:06d}.png"

    def look_adapter(self, step: int) -> Path:
        """The adapter as it was at that look: what its pictures were painted with."""
        return self.look(step).with_suffix(".safetensors")

    def looks_made(self) -> list[tuple[int, Path]]:
        """(step, file) of all that looks have left, pictures and adapters."""
        found = [path for kind in ("png", "safetensors") for path in sorted(self.looks.glob(f"step_*.{kind}"))]
        return [(int(path.stem[5:]), path) for path in found if path.stem[5:].isdecimal()]

    def relative(self, path: Path) -> str:
        """How events name a file of the folder."""
        return path.relative_to(self.path).as_posix()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within it no other run writes here.  The lock is the system's and dies with its process.

        What a killed run left half written is taken away first.  Raises SVFitError where another run holds the lock,
        and where the folder cannot be written.
        """
        lock = FileLock(self.lock, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise SVFitError(
                f"another run is writing into {self.path}: wait for it, or choose another output_dir."
            ) from None
        except OSError as error:
            raise SVFitError(
                f"output_dir {self.path} cannot be written ({error.strerror}): choose another folder."
            ) from error
        try:
            for folder in (self.path, self.checkpoints, self.looks, self.class_pictures, self.encoded):
                for left in folder.glob(TEMPORARY):
                    left.unlink(missing_ok=True)
            yield
        finally:
            self.reserve.unlink(missing_ok=True)
            lock.release()

    def note(self, event: Event) -> None:
        """Adds a line to progress.jsonl; a full disk is a warning: the run itself matters more than its diary."""
        try:
            with open(self.progress, "a", encoding="utf-8") as lines:
                lines.write(to_line(event) + "\n")
        except OSError as error:
            logger.warning(
                "%s lacks the event %r of step %d (%s).", self.progress.name, event.name, event.step, error.strerror
            )

    def events(self) -> list[Event]:
        """What has happened, oldest first; a line that a killed run left unfinished is left out."""
        return [event for event in map(from_line, self._lines()) if event is not None]

    def _lines(self) -> list[str]:
        try:
            return self.progress.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def rewind(self, step: int) -> None:
        """Takes back what came after `step`: events, looks and the end, which a run that goes on makes again."""
        kept = [event for event in self.events() if event.step <= step and event.name != "end"]
        write_atomically(self.progress, "".join(to_line(event) + "\n" for event in kept))
        for made, path in self.looks_made():
            if made > step:
                path.unlink()

    def set_aside(self, keep: str | Path | None = None) -> Path | None:
        """Moves what an earlier run left to <folder>/earlier/NNN, so that nothing is overwritten.

        Only what a run wrote is moved, and, whoever wrote it, what this run would overwrite.  `keep`: a file that this
        run still reads; it is copied instead.  Returns where it all lies now; None where there was nothing.
        """
        found = [self.config, self.curve, *self._results()]
        if self.progress.exists():
            found += [self.progress, self.checkpoints, self.looks, self.looks_sheet, self.logs]
            found += RunFolder(self.path)._results()
        found = [path for path in dict.fromkeys(found) if path.exists()]
        if not found:
            return None
        number = 1
        while (target := self.earlier / f"{number:03d}").exists():
            number += 1
        target.mkdir(parents=True)
        for path in found:
            if keep is not None and path.resolve() == Path(keep).resolve():
                shutil.copy2(path, target / path.name)
            else:
                path.rename(target / path.name)
        return target

    def _results(self) -> list[Path]:
        """The files named after the adapter that a run may leave."""
        if self.adapter_name is None:
            return []
        loras = [self.lora(kind) for kind in LORA_KINDS]
        cards = [lora.with_suffix(end) for lora in loras for end in (".preview.png", ".json")]
        words = [path for lora in loras for path in self.path.glob(f"{escape(lora.stem)}-*{lora.suffix}")]
        return [self.adapter, self.sheet, *loras, *cards, *words]

    def make_room(self) -> bool:
        """Deletes own checkpoints but the newest, then what looks have left; whether there was something to delete.

        For a disk that is full when the adapter itself is to be written.
        """
        old = sorted(self.checkpoints.glob("step-*.safetensors"), key=lambda path: path.stat().st_mtime)[:-1]
        for paths in ([self.reserve], old, [*(path for _, path in self.looks_made()), self.looks_sheet]):
            present = [path for path in paths if path.exists()]
            for path in present:
                path.unlink(missing_ok=True)
            if present:
                logger.warning("the disk is full: %s made room.", ", ".join(path.name for path in present))
                return True
        return False
