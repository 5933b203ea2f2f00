"""Where a daemon is, as the user or the environment says."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import unquote, urlsplit

from ratoon.errors import InvalidInput

#: The second of each is what clients of forkd's daemon are told by.
URL_VARIABLES = ("RATOON_URL", "FORKD_URL")
TOKEN_VARIABLES = ("RATOON_TOKEN", "FORKD_TOKEN")

#: Seconds until a daemon must have taken a connection. Answers may take as long as they take.
CONNECT_TIMEOUT = 30.0
#: In requests over a unix socket, which has no name of its own.
_LOCAL = "http://localhost"
_HOW = "write unix:///PATH, http://HOST:PORT or https://HOST:PORT"


@dataclass(frozen=True)
class Address:
    """`url` is where HTTP goes; if there is a `socket`, over that unix socket."""

    url: str
    socket: str | None = None
    token: str | None = field(default=None, repr=False)
    #: None: no TLS.
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"unix://{self.socket}" if self.socket else self.url

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"} if self.token else {}

    @property
    def host_and_port(self) -> tuple[str, int]:
        """Where to connect to, without a `socket`."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (443 if self.tls else 80)


class Source(Protocol):
    """What knows a daemon's address, and may have to start it first."""

    def find(self) -> Address:
        """The address of a daemon that listens, as far as can be told. Blocks."""

    def close(self) -> None:
        """Nobody will ask again. Blocks."""


@dataclass(frozen=True)
class Known:
    """A daemon that somebody else has started."""

    address: Address

    def find(self) -> Address:
        return self.address

    def close(self) -> None:
        pass


def parse(url: str, token: str | None, tls: ssl.SSLContext | None = None) -> Address:
    """The address that `url` says; InvalidInput. `tls` is for https, instead of the defaults."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError as error:
        raise InvalidInput(f"daemon URL {url!r}: {error}; {_HOW}") from None
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
        return Address(_LOCAL, unquote(parts.path), _checked(token))
    if parts.scheme not in ("http", "https") or not host or parts.path.strip("/") or parts.query:
        raise InvalidInput(f"daemon URL {url!r} cannot be right; {_HOW}")
    shown = f"[{host}]" if ":" in host else host
    base = f"{parts.scheme}://{shown}" + (f":{port}" if port else "")
    if parts.scheme == "http":
        return Address(base, None, _checked(token))
    return Address(base, None, _checked(token), tls or ssl.create_default_context())


def url_of_environment() -> str | None:
    return _first(URL_VARIABLES)


def token_of_environment() -> str | None:
    return _first(TOKEN_VARIABLES)


def local(socket: str, token: str | None) -> Address:
    """The address of a daemon that listens on the unix socket `socket`."""
    return Address(_LOCAL, socket, _checked(token))


def _first(variables: tuple[str, ...]) -> str | None:
    return next((value for name in variables if (value := os.environ.get(name))), None)


def _checked(token: str | None) -> str | None:
    if token is None or (token.isascii() and token.isprintable()):
        return token
    raise InvalidInput("the daemon's token has characters that no token has; see RATOON_TOKEN")
