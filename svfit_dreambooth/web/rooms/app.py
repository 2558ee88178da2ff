"""What all tabs of the page share: who asks, what is at hand, and how a mistake is told."""

import functools
import html
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from secrets import token_hex
from typing import Any

import gradio as gr

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.jobs import Jobs
from svfit_dreambooth.web.rooms.studio import Studio
from svfit_dreambooth.web.rooms.workspace import WORD, Visitor, Workspace, library_of, serve, word_for

COOKIE = "svfit_visitor"
YEAR = 365 * 24 * 3600  # seconds


@dataclass
class App:
    """What the handlers of a page work with."""

    workspace: Workspace
    studio: Studio
    jobs: Jobs
    offered: Sequence[str] = ()  # names of adapters in the computer's library that all may paint with

    def visitor(self, request: gr.Request) -> Visitor:
        """Who asks: an account where there are passwords, else a browser by its cookie, else one client's session."""
        if request.username:
            return self.workspace.visitor(word_for(f"account {request.username}"))
        word = dict(request.cookies or {}).get(COOKIE) or ""
        if WORD.fullmatch(word):
            return self.workspace.visitor(word)
        return self.workspace.visitor(word_for(f"session {request.session_hash}"))

    def serve(self, path: Path, name: str | None = None) -> str:
        return serve(self.workspace, path, name)

    def url(self, path: Path) -> str:
        """Where a browser finds `path`; relative, so that it holds behind a proxy too."""
        return "gradio_api/file=" + self.serve(path)

    def adapter_choices(self, visitor: Visitor) -> list[tuple[str, str]]:
        """(what a person reads, what the page sends) for every adapter that the visitor may paint with."""
        own = [(name, f"library/{name}") for name in library.names(visitor.library)]
        own += [(f"{Path(value).name} (offered)", value) for value in self.offers() if value.startswith("offered/")]
        return own + [(f"{name} (uploaded)", f"upload/{name}") for name in library.names(visitor.uploads)]

    def adapter_file(self, visitor: Visitor, choice: str) -> Path:
        """The file that a choice stands for.  Raises SVFitError for any that was not offered."""
        kind, _, name = choice.partition("/")
        if kind == "offered" and choice in self.offers():
            return library.find(library_of(self.workspace, ""), name)
        return library.find(visitor.uploads if kind == "upload" else visitor.library, name)

    def offers(self) -> list[str]:
        """The choices that stand for the adapters of the command line; strangers only paint with them."""
        kind = "library" if self.workspace.shared else "offered"
        there = library.names(library_of(self.workspace, "")) if self.offered else []
        return [f"{kind}/{name}" for name in self.offered if name in there]

    def find_adapter(self, visitor: Visitor, name: str) -> Path:
        """The file of the adapter `name`: the visitor's own, or one that is offered to all."""
        offered = f"offered/{name}"
        own = name in library.names(visitor.library)
        return self.adapter_file(visitor, offered if not own and offered in self.offers() else f"library/{name}")


class RememberBrowser:
    """ASGI middleware that gives every browser a random word in a cookie that scripts cannot read."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or self._word(scope):
            await self.app(scope, receive, send)
            return
        cookie = f"{COOKIE}={token_hex(16)}; Path=/; Max-Age={YEAR}; HttpOnly; SameSite=Lax"

        async def send_with_cookie(message: dict) -> None:
            if message["type"] == "http.response.start" and scope["path"] in ("/", ""):
                message = {**message, "headers": [*message.get("headers", []), (b"set-cookie", cookie.encode())]}
            await send(message)

        await self.app(scope, receive, send_with_cookie)

    @staticmethod
    def _word(scope: dict) -> str | None:
        for name, value in scope["headers"]:
            if name == b"cookie":
                try:
                    cookie = SimpleCookie(value.decode("latin-1")).get(COOKIE)
                except CookieError:
                    continue
                if cookie is not None and WORD.fullmatch(cookie.value):
                    return cookie.value
        return None


def told(error: Exception) -> gr.Error:
    """A mistake as a toast in plain words; what a file or a person wrote is shown as text, never as markup."""
    return gr.Error(html.escape(str(error)), duration=12, print_exception=False, title="That did not work")


def plainly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler`, with whatever goes wrong as a toast: SVFitError in its own words, a full disk or memory in ours."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def generator(*args: Any, **kwargs: Any) -> Any:
            with _told():
                yield from handler(*args, **kwargs)

        return generator

    @functools.wraps(handler)
    def function(*args: Any, **kwargs: Any) -> Any:
        with _told():
            return handler(*args, **kwargs)

    return function


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except (SVFitError, gr.Error) as error:
        raise (told(error) if isinstance(error, SVFitError) else error) from None
    except OSError as error:
        traceback.print_exc()
        why = error.strerror or str(error)
        sentence = f"a file could not be read or written ({why}): see whether the disk is full or the folder is gone."
        raise told(SVFitError(sentence)) from error
    except Exception as error:  # nobody should look at a page that says nothing
        traceback.print_exc()
        if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            sentence = "the memory is full: ask for smaller pictures, or wait until a run is over."
        else:
            sentence = f"something went wrong that nobody foresaw ({type(error).__name__}); the server's log says more."
        raise told(SVFitError(sentence)) from error


def number(name: str, text: str | None) -> int | float | None:
    """What a field of the form holds; None where it was left empty.  Raises SVFitError for anything but a number."""
    text = (text or "").strip()
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is None:
        return None
    if not math.isfinite(value):
        raise SVFitError(f"{name.replace('_', ' ')} is {text!r}: write a number, or leave it empty.")
    return int(value) if value == int(value) and name != "learning_rate" else value


def whole(name: str, text: str | None) -> int | None:
    """The same for a number without fraction."""
    value = number(name, text)
    if value is not None and value != int(value):
        raise SVFitError(f"{name.replace('_', ' ')} is {text!r}: write a whole number, or leave it empty.")
    return None if value is None else int(value)
