"""Published ports: listeners on the host's loopback, whose connections go on within the guest.

They are relayed through the guest's agent. So they need no network of the guest's, and no policy
has a say in them.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Protocol, Self

from ratoon.api.answers import PublishedPort
from ratoon.concurrency import run_alongside
from ratoon.errors import Conflict, HostError, InvalidInput, NotFound, RatoonError

log = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
#: Connections of one port at a time; more are closed at once.
MAX_CONNECTIONS = 128
CHUNK = 64 * 1024
#: Seconds until the next attempt where the host had no descriptor for a connection.
RETRY = 0.5
#: Two of `struct linger`: closing is a reset, or a proper end (socket(7)).
_RESET, _END = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


class Conversation(Protocol):
    """A connection to a port within the guest, as `GuestStream` is one.

    What is not read, or not taken from `write`, holds up this conversation alone.
    """

    async def read(self) -> tuple[int, bytes] | None:
        """A kind, and bytes: none of them if no more will come. None: the conversation is over."""

    async def write(self, data: bytes) -> None:
        """Send all of it; waits until there is room for it."""

    def end_input(self) -> None:
        """No more will be written."""

    async def result(self) -> object:
        """How the conversation ended. GuestError: not as it should, or it never began."""


#: Connects to a port within the guest.
Dial = Callable[[int], AbstractAsyncContextManager[Conversation]]


class HeldPort:
    """A port of the host that is held for `guest_port` of a guest that there need not be yet.

    Who connects meanwhile waits. A `with` block, after which it is free if no `Ports` took it.
    Conflict, InvalidInput: as `Ports.publish`.
    """

    def __init__(self, guest_port: int, host_port: int = 0) -> None:
        if not 1 <= guest_port <= 65535:
            raise InvalidInput(f"port {guest_port} of the guest: use 1 to 65535")
        if not 0 <= host_port <= 65535:
            raise InvalidInput(f"port {host_port} of the host: use 1 to 65535, or 0 for any")
        # It listens: two that are bound only would both have the port.
        self._listener: socket.socket | None = _listener(host_port)
        self.port = PublishedPort(guest_port, self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._listener:
            self._listener.close()

    def take(self) -> socket.socket:
        """The listener, which is the caller's from now on."""
        assert self._listener is not None, "it is taken once"
        listener, self._listener = self._listener, None
        return listener


class Ports:
    """The published ports of one sandbox. `close` ends them, and their connections."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._listening: dict[PublishedPort, tuple[socket.socket, asyncio.Task[None]]] = {}

    @property
    def published(self) -> tuple[PublishedPort, ...]:
        """In the order in which they were published."""
        return tuple(self._listening)

    def publish(self, guest_port: int | HeldPort, host_port: int = 0) -> PublishedPort:
        """Listen on `host_port` of 127.0.0.1 (0: one that is free) for `guest_port` in the guest.

        Nobody need listen there yet; a connection is reset if nobody does. Conflict: the host's
        port is taken. InvalidInput: there is no such port. Of a port that was held instead of
        `guest_port`, who connected meanwhile is served now.
        """
        held = guest_port if isinstance(guest_port, HeldPort) else HeldPort(guest_port, host_port)
        port, listener = held.port, held.take()
        listening = asyncio.create_task(_listen(listener, self._dial, port.guest_port))
        self._listening[port] = listener, listening
        return port

    async def unpublish(self, host_port: int) -> None:
        """Close this port of the host and its connections. NotFound: it is not one of these."""
        for port in self.published:
            if port.host_port == host_port:
                return await self._end(port)
        raise NotFound(f"port {host_port} of the host is not published for this sandbox")

    async def close(self) -> None:
        """Close all ports and connections; safe to repeat."""
        await asyncio.gather(*(self._end(port) for port in self.published))

    async def _end(self, port: PublishedPort) -> None:
        if not (entry := self._listening.pop(port, None)):
            return  # somebody else is at it
        listener, listening = entry
        listening.cancel()
        await asyncio.wait({listening})
        listener.close()


def _listener(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ADDRESS, port))
        listener.listen()
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                f"port {port} of {ADDRESS} is in use; choose another, or 0 for any that is free"
            ) from None
        raise HostError(f"cannot listen on {ADDRESS}:{port}: {error.strerror}") from None
    return listener


async def _listen(listener: socket.socket, dial: Dial, guest_port: int) -> None:
    """Relay what connects, for ever. Whatever becomes of a connection, the others go on."""
    loop = asyncio.get_running_loop()
    clients: set[socket.socket] = set()

    def let_go(client: socket.socket, _: object = None) -> None:
        clients.remove(client)
        client.close()

    async with asyncio.TaskGroup() as relays:
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is free, or who connected is gone
                log.warning("published port %d: %s", guest_port, error.strerror)
                await asyncio.sleep(RETRY)
                continue
            # Unless all goes well: half an answer must not pass for a whole one.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            clients.add(client)
            if len(clients) > MAX_CONNECTIONS:
                log.warning("published port %d has too many connections", guest_port)
                let_go(client)
                continue
            relay = relays.create_task(_relay(client, dial, guest_port))
            relay.add_done_callback(partial(let_go, client))


async def _relay(client: socket.socket, dial: Dial, guest_port: int) -> None:
    """Carry bytes to and fro, and the end of either direction, until the guest's side is over."""
    try:
        async with dial(guest_port) as guest:
            await run_alongside(_from_guest(guest, client), _to_guest(client, guest))
            await guest.result()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _END)
    except (RatoonError, OSError) as error:
        log.debug("a connection to published port %d ended: %s", guest_port, error)


async def _from_guest(guest: Conversation, client: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while (piece := await guest.read()) is not None:
        if piece[1]:
            await loop.sock_sendall(client, piece[1])
        else:
            client.shutdown(socket.SHUT_WR)


async def _to_guest(client: socket.socket, guest: Conversation) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(client, CHUNK):
        await guest.write(data)
    guest.end_input()
