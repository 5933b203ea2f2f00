"""Who may talk to the daemon: whoever bears its token, or whoever can reach its socket.

Without a token it listens on a unix socket or a loopback address alone. A browser reaches those as
well, on behalf of any page that it shows: so requests that come from another site, or for another
name, are refused.
"""

from __future__ import annotations

import hmac
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ratoon.daemon.problems import error_response
from ratoon.errors import InvalidInput

_SHORTEST = 16
_PLACEHOLDERS = ("REPLACE_ME", "CHANGE_ME")


def read_token(path: Path) -> str:
    """The token in a file; InvalidInput unless it can be one."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"token file {path}: {getattr(error, 'strerror', 'not text')}") from None
    if token.startswith(_PLACEHOLDERS):
        raise InvalidInput(
            f"token file {path} still has its placeholder; "
            f"put a token there, such as `openssl rand -hex 32` makes"
        )
    if len(token.encode()) < _SHORTEST or not token.isprintable():
        raise InvalidInput(f"token file {path}: a token is {_SHORTEST} bytes or more, on one line")
    return token


def is_loopback(host: str) -> bool:
    """Whether this name or address is this machine, seen from itself alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets those requests through that may pass."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token and token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and (refusal := self._refusal(scope)):
            status, text = refusal
            headers = {"www-authenticate": "Bearer"} if status == 401 else {}
            response = error_response(status, text, "Unauthorized", **headers)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        if scope["path"] == "/healthz" and scope.get("method") == "GET":
            return None
        headers = Headers(scope=scope)
        if self._token:
            given = headers.get("authorization", "")
            if not given.lower().startswith("bearer "):
                return 401, "missing bearer token"
            right = hmac.compare_digest(
                given[len("bearer ") :].strip().encode("latin-1"), self._token
            )
            return None if right else (401, "invalid bearer token")
        on_tcp = bool(scope.get("server") and scope["server"][1])
        if on_tcp and not is_loopback(_host(f"//{headers.get('host', '')}")):
            return 403, "without a token the daemon answers to localhost alone"
        origin = headers.get("origin")
        if origin and not is_loopback(_host(origin)):
            return 403, f"pages of {origin} may not use the daemon"
        return None


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
