"""Ctrl-C, and the signals by which systems end programs."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
]  # Windows knows no SIGHUP, the others no SIGBREAK


@contextmanager
def stop_signals(at_once: bool = False) -> Iterator[Callable[[], bool]]:
    """Within it a signal is noted, and the function tells whether one came; a second one interrupts.

    `at_once`: the first one interrupts already, by KeyboardInterrupt.
    """
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked or at_once:
            raise KeyboardInterrupt
        asked.append(number)
        logger.warning("stopping after this step; once more, and it stops at once.")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    heard = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup wants it
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
