"""Where the daemon listens: a unix socket that is its user's alone, and TCP on request."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ratoon.daemon.auth import is_loopback
from ratoon.errors import Conflict, HostError, InvalidInput


@contextmanager
def unix_socket(path: Path) -> Iterator[socket.socket]:
    """A bound socket at `path`, mode 0600, which goes with the block.

    One that nobody listens on any more is replaced. Conflict: somebody does. HostError.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.parent.stat().st_uid != os.geteuid():
                raise HostError(f"{path.parent} is another user's; set RATOON_RUNTIME")
            _require_unused(path)
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            path.chmod(0o600)  # before it listens
        except OSError as error:
            raise HostError(f"cannot listen on {path}: {error.strerror or error}") from None
        made = path.stat().st_ino
        try:
            yield listener
        finally:
            with suppress(FileNotFoundError):
                if path.stat().st_ino == made:
                    path.unlink()


def _require_unused(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise Conflict(f"somebody listens on {path}; set another RATOON_RUNTIME for this store")


@contextmanager
def tcp_socket(bind: str, *, has_token: bool) -> Iterator[socket.socket]:
    """A socket bound to `bind`, HOST:PORT; port 0 is any that is free.

    InvalidInput: that is no address, or not this machine's alone and there is no token. HostError.
    """
    host, _, port = bind.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(f"cannot listen on {bind!r}: write HOST:PORT, such as 127.0.0.1:8889")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise InvalidInput(f"cannot listen on {bind}: {error.strerror}") from None
    if not has_token and not is_loopback(str(address[0])):
        raise InvalidInput(
            f"{bind} can be reached from other machines: give a token (--token-file), "
            "or listen on 127.0.0.1"
        )
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What it accepts has these too: a client that vanished is noticed, however long it takes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        try:
            listener.bind(address)
        except OSError as error:
            raise HostError(f"cannot listen on {bind}: {error.strerror}") from None
        yield listener
