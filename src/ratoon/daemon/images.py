"""Who may have which image of this host's files."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import HTTPConnection

from ratoon.daemon.context import Daemon


def roots_for(daemon: Daemon, connection: HTTPConnection) -> tuple[Path, ...] | None:
    """The directories that local images may lie below; None: anywhere.

    Who reaches the unix socket is root, and may have any.
    """
    server = connection.scope.get("server")
    if not (server and server[1]):  # it has no port
        return None
    return daemon.settings.image_roots
