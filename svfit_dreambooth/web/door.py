"""Who comes in: what stands before every request to the page, and before anything of Gradio's.

A foreign web page can make a browser ask this server: by its own name, pointed at this computer (DNS rebinding), or
straight, from another origin.  So a request must name the server as it is known, and come from the page itself.
"""

import ipaddress
import socket
from collections.abc import Iterable
from contextlib import asynccontextmanager
from http.cookies import CookieError, SimpleCookie
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.workspace import COOKIE, WORD

YEAR = 365 * 24 * 3600  # seconds
LOCAL = ("localhost", "127.0.0.1", "::1")
EVERYWHERE = ("0.0.0.0", "::", "")
HEADERS = (
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Hosts:
    """The names by which browsers may ask for the page: those of this computer, and `also` (`--allow_host`).

    `listen`: the address listened on.  Where that is every address, a Host may be any address: no foreign page can
    have one for its name.  Raises SVFitError for a name in `also` that is none.
    """

    def __init__(self, listen: str = "127.0.0.1", also: Iterable[str] = ()):
        self.also = set()
        for name in also:
            if host_name(name) != name.lower().strip("[]"):
                raise SVFitError(f"allow_host is {name!r}: write a name or an address alone, such as page.example.org.")
            self.also.add(host_name(name))
        self.everywhere = listen in EVERYWHERE
        own = socket.gethostname().lower()
        self.names = {*LOCAL, *self.also, *((own, f"{own}.local") if self.everywhere else (listen.lower(),))}

    def know(self, host: str) -> bool:
        """Is a Host header one of ours?"""
        name = host_name(host)
        return name is not None and (name in self.names or (self.everywhere and _is_address(name)))

    def own(self, origin: str, host: str) -> bool:
        """Does an Origin header stand for the page that is known as `host`?  A proxy may have changed the host."""
        parts = _split(origin.partition("://")[2]) if origin.startswith(("http://", "https://")) else None
        return parts is not None and (origin.partition("://")[2].lower() == host.lower() or parts.hostname in self.also)


def host_name(host: str) -> str | None:
    """The name in a Host header, without its port; None where it has none."""
    parts = _split(host if host.count(":") < 2 or "[" in host else f"[{host}]")
    return parts.hostname if parts is not None else None


def _split(place: str) -> Any:
    """name[:port], in parts; None for anything else."""
    try:
        parts = urlsplit(f"//{place}")
        _ = parts.port
    except ValueError:
        return None
    plain = parts.netloc == place and parts.username is None and not any(letter in place for letter in ' \\"%,;<>')
    return parts if plain and parts.hostname else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Door:
    """ASGI middleware that lets in what names this server and comes from its own page, or from no page at all."""

    def __init__(self, app: Any, hosts: Hosts):
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif refusal := self._refusal(scope):
            await refuse(scope, send, *refusal)
        else:

            async def send_with_headers(message: dict) -> None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message.get("headers", []), *HEADERS]}
                await send(message)

            await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: dict) -> tuple[int, str] | None:
        """Status and sentence for a request that must not come in."""
        hosts = header(scope, b"host")
        if len(hosts) != 1 or not self.hosts.know(hosts[0]):
            called = ", ".join(hosts) or "no name"
            return 421, f"this page is not known as {called}: start it with --allow_host NAME to let that name in."
        origins = header(scope, b"origin")
        if any(not self.hosts.own(origin, hosts[0]) for origin in origins):
            return 403, f"requests from {', '.join(origins)} are not answered: only the page itself may ask."
        if any(site in ("cross-site", "same-site") for site in header(scope, b"sec-fetch-site")) and not (
            scope.get("method") in ("GET", "HEAD")
            and scope["path"] in ("", "/")
            and header(scope, b"sec-fetch-mode") == ["navigate"]
            and header(scope, b"sec-fetch-dest") == ["document"]
        ):
            return 403, "requests from other sites are not answered: open the page itself."
        return None


def header(scope: dict, name: bytes) -> list[str]:
    """The values of a header, as they were sent."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def refuse(scope: dict, send: Any, status: int, sentence: str, *more: tuple[bytes, bytes]) -> None:
    """Answers with a sentence, without having read what was sent; `more`: headers."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": sentence[:120]})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close"), *HEADERS, *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"error: {sentence}\n".encode()})


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
        for value in header(scope, b"cookie"):
            try:
                cookie = SimpleCookie(value).get(COOKIE)
            except CookieError:
                continue
            if cookie is not None and WORD.fullmatch(cookie.value):
                return cookie.value
        return None


def before(*layers: Any) -> Any:
    """A lifespan for Gradio's server in which `layers`, the outermost first, stand before all that it does itself.

    Its own answers to other origins come before any middleware that it is given.
    """

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        for layer in reversed(layers):
            app.middleware_stack = layer(app.middleware_stack)
        yield

    return lifespan
