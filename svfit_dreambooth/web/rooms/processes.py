"""Whether a process is still the one that was started, and how it is asked to end: on Linux, macOS and Windows alike.

A number alone says little, since the system gives it to another process later; with the time at which the process was
created, it says all.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil

TOLERANCE = 2.0  # seconds by which a creation time may differ when it is read again: the clock is set now and then


def created_at(pid: int) -> float | None:
    """Unix seconds at which the process was created; None where there is none."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


def is_running(pid: int | None, created: float | None, config: Path) -> bool:
    """Does the process `pid`, created then, still work on the file `config`?"""
    if pid is None:
        return False
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # ended, and nobody has asked how
            return False
        same = created is not None and abs(process.create_time() - created) <= TOLERANCE
        return same or str(config) in process.cmdline()  # whatever happened to the clock
    except psutil.AccessDenied:  # somebody else's has the number now
        return False
    except psutil.Error:
        return False


def working_on(config: Path) -> int | None:
    """The process that was started on the file `config`: one of a server that went down before it could note it."""
    for process in psutil.process_iter(["cmdline", "status"]):
        if str(config) in (process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE:
            return process.pid
    return None


def ask_to_stop(pid: int) -> None:
    """Lets a run save what it has learnt and end; a run on Windows hears Ctrl-Break, on other systems SIGTERM."""
    with suppress(ProcessLookupError):
        os.kill(pid, getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
