"""Paintings that are under way: each in a thread of its own, watched by whoever asked for it, ended when nobody does."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import pictures
from svfit_dreambooth.web.rooms.orders import Cell, Order, Told, check
from svfit_dreambooth.web.rooms.studio import Studio
from svfit_dreambooth.web.rooms.workspace import Visitor

GRACE = 60.0  # seconds for which a painting goes on while nobody looks: a page that is reloaded finds it again
LOOK = 1.0  # seconds between signs of life of who looks


@dataclass
class Made:
    """A picture that is done, and kept."""

    path: Path
    cell: Cell
    settings: dict[str, Any]
    filtered: bool


class Painting(threading.Event):
    """A painting under way.  As an event it says whether to stop: because it was asked to, or nobody has looked."""

    def __init__(self, order: Order, folder: Path, grace: float = GRACE):
        super().__init__()
        self.order = order
        self.made: list[Made] = []
        self.said = Told("starting")
        self.failure: Exception | None = None
        self.over = False
        self._folder = folder
        self._grace = grace
        self._news = threading.Condition()
        self._number = 0  # of what happened last
        self._looked = time.monotonic()

    def is_set(self) -> bool:
        return super().is_set() or time.monotonic() - self._looked > self._grace

    def look(self, seen: int) -> int:
        """Waits a moment until there is more than `seen`, which is returned anew; the painting knows it is watched."""
        with self._news:
            if self._number == seen and not self.over:
                self._news.wait(LOOK)
            self._looked = time.monotonic()
            return self._number

    def tell(self, event: Told) -> None:
        """Notes what has happened; a picture is kept first."""
        made = None
        if event.kind == "picture":
            path = pictures.keep(self._folder, self.order, event.picture)
            made = Made(path, event.cell, event.picture.settings, event.picture.filtered)
        with self._news:
            if made is not None:
                self.made.append(made)
            self.said, self._number = event, self._number + 1
            self._news.notify_all()

    def end(self, failure: Exception | None = None) -> None:
        with self._news:
            self.failure, self.over, self._number = failure, True, self._number + 1
            self._news.notify_all()


class Paintings:
    """Who is painting now."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self._lock = threading.Lock()
        self._working: dict[str, list[Painting]] = {}  # visitor's word -> paintings

    def of(self, visitor: Visitor) -> list[Painting]:
        """The visitor's, the oldest first."""
        with self._lock:
            return list(self._working.get(visitor.word, ()))

    def begin(self, visitor: Visitor, order: Order, *, alone: bool = True, grace: float = GRACE) -> Painting:
        """Starts a painting.  `alone`: only where the visitor has none yet.  Raises SVFitError where it cannot be."""
        check(order)
        painting = Painting(order, visitor.pictures, grace)
        with self._lock:
            mine = self._working.setdefault(visitor.word, [])
            if alone and mine:
                raise SVFitError("your last pictures are still being painted: wait, or press Stop.")
            mine.append(painting)
        threading.Thread(target=self._work, args=(visitor, painting), daemon=True).start()
        return painting

    def _work(self, visitor: Visitor, painting: Painting) -> None:
        failure: Exception | None = None
        try:
            self.studio.paint(painting.order, painting.tell, painting, visitor.person)
        except Exception as error:  # noqa: BLE001 - raised again where somebody looks
            failure = error
        finally:
            with self._lock:
                self._working[visitor.word].remove(painting)
                if not self._working[visitor.word]:
                    del self._working[visitor.word]
            painting.end(failure)
