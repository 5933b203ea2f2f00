"""A channel, and a peer at its other end that does as it is told."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.shared import wire
from ratoon.machine.guest.shared.wire import MARKER, NONCE_BYTES

SYNC_BYTES = len(MARKER) + NONCE_BYTES


class Peer:
    """The other end of a channel, where the agent would be. Only the script of a test speaks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = wire.Decoder()
        self._frames: list[tuple[int, int, bytes]] = []
        #: Everything that `receive` has returned.
        self.heard: list[tuple[int, int, bytes]] = []

    async def greeting(self) -> bytes:
        """The nonce of the session that the host begins."""
        greeting = await self._reader.readexactly(SYNC_BYTES)
        assert greeting.startswith(MARKER)
        return greeting[len(MARKER) :]

    async def receive(self) -> tuple[int, int, bytes]:
        while not self._frames:
            data = await self._reader.read(1 << 20)
            assert data, "the host has closed the channel"
            self._decoder.feed(data)
            self._frames = self._decoder.frames()
        self.heard.append(self._frames.pop(0))
        return self.heard[-1]

    async def request(self) -> tuple[int, dict[str, Any]]:
        stream, kind, payload = await self.receive()
        assert kind == wire.REQUEST
        return stream, json.loads(payload)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def send(self, stream: int, kind: int, payload: bytes = b"") -> None:
        self.write(wire.encode(stream, kind, payload))

    def reply(self, stream: int, **fields: Any) -> None:
        self.send(stream, wire.REPLY, json.dumps(fields).encode())

    async def silence(self, seconds: float = 0.05) -> None:
        """Nothing comes for a while."""
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self.receive(), seconds)

    async def closed(self) -> None:
        """The host has gone away."""
        async with asyncio.timeout(5):
            with suppress(ConnectionResetError):
                while await self._reader.read(1 << 20):
                    pass

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Channel, Peer]]:
    arrived: asyncio.Future[Peer] = asyncio.get_running_loop().create_future()

    def arrive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.set_result(Peer(reader, writer))

    with tempfile.TemporaryDirectory(prefix="ratoon-") as directory:
        path = Path(directory, "agent")
        server = await asyncio.start_unix_server(arrive, path)
        channel = await Channel.connect(path, "sb-test")
        peer = await arrived
        try:
            yield channel, peer
        finally:
            channel.close()
            await peer.close()
            server.close()
            await server.wait_closed()


async def together(*waiting: Awaitable[Any]) -> list[Any]:
    """The results of all, errors as values."""
    async with asyncio.timeout(10):
        return await asyncio.gather(*waiting, return_exceptions=True)
