"""The named volumes of a daemon."""

from __future__ import annotations

from ratoon.api.answers import VolumeInfo, read
from ratoon.client.aio.connection import AsyncConnection, segment

VolumeInfos = list[VolumeInfo]


class AsyncVolumes:
    """All named volumes of a store: `client.volumes`. A sandbox that names one makes it, too."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def list(self) -> VolumeInfos:
        """All of them."""
        return read(VolumeInfos, await self._connection.ask("GET", "/v1/volumes"))

    async def create(self, name: str) -> VolumeInfo:
        """Make one, which is empty; AlreadyExists."""
        return read(
            VolumeInfo, await self._connection.ask("POST", "/v1/volumes", body={"name": name})
        )

    async def remove(self, name: str) -> None:
        """Remove one with all its files; NotFound. Conflict: a sandbox may write to it."""
        await self._connection.ask("DELETE", f"/v1/volumes/{segment(name)}")
