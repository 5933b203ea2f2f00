"""Ports of a sandbox: published on the daemon's host, or connected to from here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ratoon.api.answers import PublishedPort, read
from ratoon.client.aio.connection import AsyncConnection, begun
from ratoon.client.aio.conversations import AsyncConversation

PublishedPorts = list[PublishedPort]

#: Bytes in one message.
_CHUNK = 64 * 1024


class AsyncDialled:
    """A TCP connection that was made within the guest."""

    def __init__(self, talk: AsyncConversation) -> None:
        self._talk = talk
        self._over = False

    async def send(self, data: bytes) -> None:
        """Send all of it; waits while the guest does not take it."""
        for start in range(0, len(data), _CHUNK):
            await self._talk.send(data[start : start + _CHUNK])

    async def end(self) -> None:
        """No more will be sent; there may be more to receive."""
        await self._talk.send_json(eof=True)

    async def receive(self) -> bytes:
        """What comes next; empty once no more will come. GuestError: it was reset."""
        if not self._over:
            message = await self._talk.receive()
            if isinstance(message, bytes):
                return message
            self._over = True
        return b""


class AsyncPorts:
    """The ports of one sandbox: `sandbox.ports`. What listens may listen on the guest's loopback.

    No network policy has a say in them.
    """

    def __init__(self, connection: AsyncConnection, path: str) -> None:
        self._connection = connection
        self._sandbox = path
        self._path = f"{path}/ports"

    async def publish(
        self, guest_port: int, host_port: int | None = None, address: str | None = None
    ) -> PublishedPort:
        """Have a port of the daemon's host (None: any) lead to one in the guest.

        `address`: an address of that host, in digits; None: its loopback. Nobody need listen in the
        guest yet. Conflict: the host's port is taken.
        """
        body = {"guest_port": guest_port, "host_port": host_port, "address": address}
        return read(PublishedPort, await self._connection.ask("POST", self._path, body=body))

    async def list(self) -> PublishedPorts:
        """Those that are published."""
        return read(PublishedPorts, await self._connection.ask("GET", self._path))

    async def unpublish(self, guest_port: int) -> None:
        """Close the ports that lead there, and their connections. NotFound: there are none."""
        await self._connection.ask("DELETE", f"{self._path}/{guest_port}")

    @asynccontextmanager
    async def dial(self, guest_port: int) -> AsyncIterator[AsyncDialled]:
        """A TCP connection from within the guest to a port of its loopback.

        It is closed with the block. GuestError: nobody listens there.
        """
        path = f"{self._sandbox}/dial/{guest_port}"
        async with self._connection.converse(path) as talk:
            await begun(talk)
            yield AsyncDialled(talk)
