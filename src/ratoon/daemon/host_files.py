"""Which files of this host a request may have: who reaches the unix socket is root, and has any."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import HTTPConnection

from ratoon.daemon.context import Daemon
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.errors import InvalidInput


def image_roots(daemon: Daemon, connection: HTTPConnection) -> tuple[Path, ...] | None:
    """The directories that local images may lie below; None: anywhere."""
    return daemon.settings.image_roots if _over_tcp(connection) else None


def require_allowed(daemon: Daemon, connection: HTTPConnection, options: SandboxOptions) -> None:
    """InvalidInput: who asks may not have such a directory of the host as a volume.

    TCP is for those that lie below a directory that was chosen; a volume's source has no symbolic
    link in it, so names decide.
    """
    if not _over_tcp(connection):
        return
    roots = [root.resolve() for root in daemon.settings.volume_roots]
    for volume in options.volumes:
        if not volume.named and not any(Path(volume.source).is_relative_to(r) for r in roots):
            raise InvalidInput(
                f"{volume.source}: over TCP, this directory of the host is not to be had; "
                "see `serve --volume-root`"
            )


def _over_tcp(connection: HTTPConnection) -> bool:
    server = connection.scope.get("server")
    return bool(server and server[1])  # a unix socket has no port
