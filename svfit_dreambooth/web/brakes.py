"""Brakes on what strangers may do often or at length: guess passwords, and upload; and what they may never have done."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from svfit_dreambooth.files import size_text
from svfit_dreambooth.web.door import header, refuse
from svfit_dreambooth.web.rooms.workspace import network

FREE_GUESSES = 5  # wrong passwords of one network that cost nothing
MANY_GUESSES = 100  # of all networks within an hour, after which one is free
LONGEST_WAIT = 900.0  # seconds
HOUR = 3600.0  # seconds
MAX_UPLOADED = 2 * 10**9  # bytes of one network within an hour
UPLOADS = ("/upload", "/component_server")  # where files come in; the latter those of the editors of pictures
FREE_BYTES = 10**9  # that uploads leave on the disk


def fetch_nothing() -> None:
    """Keeps Gradio from fetching addresses, which clients may give in the place of files and ask for as files.

    It would fetch any public one, for anybody, of any length, past all that stands before uploads.
    """
    import gradio as gr
    import safehttpx  # by which it fetches, in all of its places

    async def refuse(url: str, *_: Any, **__: Any) -> Any:
        raise gr.Error(f"{url!r} is not fetched here: upload the file itself.", print_exception=False)

    safehttpx.get = safehttpx.async_validate_url = refuse  # type: ignore[assignment]


class PasswordBrake:
    """ASGI middleware: after a few wrong passwords a network waits, each time twice as long."""

    def __init__(self, app: Any, clock: Callable[[], float] = time.monotonic):
        self.app = app
        self.clock = clock
        self._wrong: dict[str, list[float]] = {}  # network -> when, within the last hour

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].rstrip("/") != "/login":
            await self.app(scope, receive, send)
            return
        who, now = network(scope["client"]), self.clock()
        for name in list(self._wrong):
            self._wrong[name] = [when for when in self._wrong[name] if now - when < HOUR]
            if not self._wrong[name]:
                del self._wrong[name]
        if (wait := self._wait(who, now)) > 0:
            sentence = f"too many wrong passwords: wait {wait:.0f} s."
            await refuse(scope, send, 429, sentence, (b"retry-after", f"{wait:.0f}".encode()))
            return
        self._wrong.setdefault(who, []).append(now)  # until it proves right: many may come at once

        async def listen(message: dict) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self._wrong.pop(who, None)
            await send(message)

        await self.app(scope, receive, listen)

    def _wait(self, who: str, now: float) -> float:
        """Seconds until a network may try again."""
        wrong = self._wrong.get(who, [])
        free = FREE_GUESSES if sum(map(len, self._wrong.values())) < MANY_GUESSES else 1
        if len(wrong) < free:
            return 0.0
        return min(2.0 ** (len(wrong) - free), LONGEST_WAIT) - (now - wrong[-1])


class UploadBrake:
    """ASGI middleware: uploads leave room on the disk of `folder`, and a network brings only so much in an hour."""

    def __init__(self, app: Any, folder: Path, clock: Callable[[], float] = time.monotonic):
        self.app = app
        self.folder = folder
        self.clock = clock
        self._brought: dict[str, list[tuple[float, int]]] = {}  # network -> (when, bytes), within the last hour

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].rstrip("/").endswith(UPLOADS):
            await self.app(scope, receive, send)
            return
        who, now = network(scope["client"]), self.clock()
        brought = [(when, size) for when, size in self._brought.get(who, []) if now - when < HOUR]
        self._brought[who] = brought
        length = header(scope, b"content-length")
        size = int(length[0]) if length and length[0].isascii() and length[0].isdigit() else None
        if size is None:
            await refuse(scope, send, 411, "an upload must say how long it is (Content-Length).")
        elif sum(earlier for _, earlier in brought) + size > MAX_UPLOADED:
            most = size_text(MAX_UPLOADED)
            await refuse(scope, send, 429, f"more than {most} within an hour: wait before you upload again.")
        elif shutil.disk_usage(self.folder).free - size < FREE_BYTES:
            await refuse(scope, send, 507, f"the disk is nearly full: an upload of {size_text(size)} must wait.")
        else:
            brought.append((now, size))
            await self.app(scope, receive, send)
