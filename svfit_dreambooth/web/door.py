"""Who comes in: what stands before every request to the page."""

from http.cookies import CookieError, SimpleCookie
from secrets import token_hex
from typing import Any

from svfit_dreambooth.web.rooms.workspace import COOKIE, WORD

YEAR = 365 * 24 * 3600  # seconds


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
