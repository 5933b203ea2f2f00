# Made from ../aio/volumes.py by scripts/make_sync.py: change it there.
"""The named volumes of a daemon."""

from __future__ import annotations

from ratoon.api.answers import VolumeInfo, read
from ratoon.client.sync.connection import Connection, segment

VolumeInfos = list[VolumeInfo]


class Volumes:
    """All named volumes of a store: `client.volumes`. A sandbox that names one makes it, too."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> VolumeInfos:
        """All of them."""
        return read(VolumeInfos, self._connection.ask("GET", "/v1/volumes"))

    def create(self, name: str) -> VolumeInfo:
        """Make one, which is empty; AlreadyExists."""
        return read(VolumeInfo, self._connection.ask("POST", "/v1/volumes", body={"name": name}))

    def remove(self, name: str) -> None:
        """Remove one with all its files; NotFound. Conflict: a sandbox may write to it."""
        self._connection.ask("DELETE", f"/v1/volumes/{segment(name)}")
