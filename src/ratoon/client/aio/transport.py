"""Bytes to a daemon and from it. `ratoon.client.sync` has a module of its own for them."""

from __future__ import annotations

import asyncio
from select import POLLIN, poll
from typing import Any, Self

from ratoon.client.address import CONNECT_TIMEOUT, Address
from ratoon.client.problems import ConnectionLost, unreachable

#: Bytes that are read at once.
_PIECE = 256 * 1024


class AsyncTransport:
    """A connection, over a unix socket, TCP or TLS."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, address: Address) -> Self:
        """Unreachable: nobody is there."""
        loop = asyncio.get_running_loop()
        reader = _Reader(limit=_PIECE, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport: Any
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                if address.socket:
                    transport, _ = await loop.create_unix_connection(
                        lambda: protocol, address.socket
                    )
                else:
                    transport, _ = await loop.create_connection(
                        lambda: protocol, *address.host_and_port, ssl=address.tls
                    )
        except OSError as error:
            raise unreachable(address, error) from error
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    @property
    def is_open(self) -> bool:
        """Whether the daemon has not closed it: an end is something to be read."""
        readable = poll()
        readable.register(self._writer.get_extra_info("socket"), POLLIN)
        return not (
            self._reader.at_eof() or self._writer.transport.is_closing() or readable.poll(0)
        )

    async def read(self) -> bytes:
        """What has come, as soon as there is some; b"" at the end."""
        return await self._reader.read(_PIECE)

    async def write(self, data: bytes) -> None:
        """Waits until most of it is on its way. ConnectionLost."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def close(self) -> None:
        self._writer.transport.abort()


class _Reader(asyncio.StreamReader):
    """Also when a connection breaks off, what has come by then is read."""

    def set_exception(self, exc: Exception) -> None:
        self.feed_eof()
