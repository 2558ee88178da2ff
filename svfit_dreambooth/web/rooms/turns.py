"""Turns, fairly: next comes whoever had none for longest; of what one person wants, what was asked for first."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from svfit_dreambooth.errors import SVFitError

T = TypeVar("T")
LOOK = 0.1  # seconds between looks whether waiting was given up


def in_turn(
    waiting: Sequence[T], who: Callable[[T], str], since: Callable[[T], float], served: Mapping[str, float]
) -> list[T]:
    """All that wait, in the order of their turns.  `served`: when each person had the last one."""
    left, last, order = sorted(waiting, key=since), dict(served), []
    latest = max(last.values(), default=0.0)
    while left:
        chosen = min(left, key=lambda one: last.get(who(one), -math.inf))
        left.remove(chosen)
        order.append(chosen)
        latest += 1
        last[who(chosen)] = latest
    return order


class Line:
    """A thing that one at a time may have.  Of one person at most `most_each` may use or want it, of all `most`."""

    def __init__(self, most_each: int, most: int):
        self.most_each, self.most = most_each, most
        self._changed = threading.Condition()
        self._inside: list[str] = []  # who wants it or has it, once for each wish
        self._waiting: list[tuple[float, str]] = []  # (since, who)
        self._served: dict[str, float] = {}
        self._busy = False

    @contextmanager
    def wish(self, who: str) -> Iterator[None]:
        """Within it one wish of a person counts.  Raises SVFitError where there are too many."""
        with self._changed:
            mine = self._inside.count(who)
            if mine >= self.most_each:
                raise SVFitError(f"{mine} of your orders wait or are being painted already: let some finish first.")
            if len(self._inside) >= self.most:
                raise SVFitError(f"{len(self._inside)} orders wait already: try again in a while.")
            self._inside.append(who)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(who)

    def take(self, who: str, cancelled: threading.Event, on_wait: Callable[[], None]) -> bool:
        """Waits for a turn, which `give_back` ends; False, and there is none: `cancelled` meanwhile."""
        with self._changed:
            ticket = (time.monotonic(), who)
            self._waiting.append(ticket)
            try:
                told = False
                while self._busy or self._next() is not ticket:
                    if cancelled.is_set():
                        return False
                    if not told:
                        told = True
                        on_wait()
                    self._changed.wait(LOOK)
                self._busy = True
                return True
            finally:
                self._waiting.remove(ticket)

    def take_if_free(self) -> bool:
        """The thing at once, if nobody has it: for what serves nobody in particular."""
        with self._changed:
            free, self._busy = not self._busy, True
            return free

    def give_back(self, who: str | None = None) -> None:
        with self._changed:
            self._busy = False
            if who is not None:
                self._served[who] = time.monotonic()
                for name in sorted(self._served, key=self._served.__getitem__)[: -10 * self.most]:
                    del self._served[name]  # as good as new
            self._changed.notify_all()

    def others_wait(self, who: str) -> bool:
        """Does anybody else wait for a turn?"""
        with self._changed:
            return any(other != who for _, other in self._waiting)

    @property
    def is_free(self) -> bool:
        return not self._busy

    def _next(self) -> tuple[float, str]:
        return in_turn(self._waiting, lambda one: one[1], lambda one: one[0], self._served)[0]
