"""Published ports: listeners on the host, whose connections go on within the guest.

They are relayed through the guest's agent. So they need no network of the guest's, and no policy
has a say in them.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import partial
from typing import Protocol, Self

from ratoon.api.answers import LOOPBACK, PublishedPort
from ratoon.concurrency import run_alongside
from ratoon.errors import Conflict, HostError, InvalidInput, NotFound, RatoonError

log = logging.getLogger(__name__)

#: Of those that wait to be served; the kernel cuts it to net.core.somaxconn.
BACKLOG = 4096
#: Connections of a sandbox that are served at a time, while others wait: the agent has 1,024
#: descriptors, and each takes two of them.
MAX_CONNECTIONS = 400
CHUNK = 64 * 1024
#: Seconds until the next attempt where the host had no descriptor for a connection.
RETRY = 0.5
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
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


Listeners = Sequence[socket.socket]
#: Connects to a port within the guest.
Dial = Callable[[int], AbstractAsyncContextManager[Conversation]]


class HeldPort:
    """A port of the host that is held for `guest_port` of a guest that there need not be yet.

    Who connects meanwhile waits. A `with` block, after which it is free if no `Ports` took it.
    Conflict, InvalidInput: as `Ports.publish`.
    """

    def __init__(self, guest_port: int, host_port: int = 0, address: str = LOOPBACK) -> None:
        if not 1 <= guest_port <= 65535:
            raise InvalidInput(f"port {guest_port} of the guest: use 1 to 65535")
        if not 0 <= host_port <= 65535:
            raise InvalidInput(f"port {host_port} of the host: use 1 to 65535, or 0 for any")
        # They listen: two that are bound only would both have the port.
        self._listeners = _listeners(address, host_port)
        at, number, *_ = self._listeners[0].getsockname()
        self.port = PublishedPort(guest_port, number, at)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.close()

    def take(self) -> Listeners:
        """The listeners, which are the caller's from now on."""
        assert self._listeners, "they are taken once"
        listeners, self._listeners = self._listeners, ()
        return listeners


class Ports:
    """The published ports of one sandbox. `close` ends them, and their connections."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)
        self._listening: dict[PublishedPort, tuple[Listeners, asyncio.Task[None]]] = {}

    @property
    def published(self) -> tuple[PublishedPort, ...]:
        """In the order in which they were published."""
        return tuple(self._listening)

    def publish(
        self, guest_port: int | HeldPort, host_port: int = 0, address: str = LOOPBACK
    ) -> PublishedPort:
        """Listen on `host_port` (0: one that is free) of `address` for `guest_port` in the guest.

        With 127.0.0.1, also on ::1, where there is that and its port is free. Nobody need listen in
        the guest yet; a connection is reset if nobody does. Conflict: the host's port is taken.
        InvalidInput: there is no such port, or address. Of a port that was held instead of
        `guest_port`, who connected meanwhile is served now.
        """
        held = guest_port
        if not isinstance(held, HeldPort):
            held = HeldPort(held, host_port, address)
        listeners = held.take()
        serving = _serve(listeners, self._dial, held.port.guest_port, self._room)
        self._listening[held.port] = listeners, asyncio.create_task(serving)
        return held.port

    async def unpublish(self, port: PublishedPort) -> None:
        """Close this port of the host and its connections. NotFound: it is not one of these."""
        if port not in self._listening:
            raise NotFound(f"port {port.host_port} of {port.address} is not published here")
        await self._end(port)

    async def close(self) -> None:
        """Close all ports and connections; safe to repeat."""
        await asyncio.gather(*(self._end(port) for port in self.published))

    async def _end(self, port: PublishedPort) -> None:
        if not (entry := self._listening.pop(port, None)):
            return  # somebody else is at it
        listeners, serving = entry
        serving.cancel()
        await asyncio.wait({serving})
        for listener in listeners:
            listener.close()


def _listeners(address: str, port: int) -> Listeners:
    first = _listener(address, port)
    if address != LOOPBACK:
        return (first,)
    with suppress(Conflict, InvalidInput, HostError):  # `localhost` may be either of them
        return (first, _listener("::1", first.getsockname()[1]))
    return (first,)


def _listener(address: str, port: int) -> socket.socket:
    try:
        family = _FAMILIES[ipaddress.ip_address(address).version]
    except ValueError:
        raise InvalidInput(f"{address!r} is no address: write it in digits") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # else :: would be 0.0.0.0 as well
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                f"port {port} of {address} is in use; choose another, or 0 for any that is free"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            raise InvalidInput(f"{address} is no address of this host") from None
        raise HostError(f"cannot listen on {address}, port {port}: {error.strerror}") from None
    return listener


async def _serve(
    listeners: Listeners, dial: Dial, guest_port: int, room: asyncio.Semaphore
) -> None:
    """Relay what connects, for ever. Whatever becomes of a connection, the others go on."""
    async with asyncio.TaskGroup() as tasks:
        for listener in listeners:
            tasks.create_task(_listen(listener, dial, guest_port, room, tasks))


async def _listen(
    listener: socket.socket,
    dial: Dial,
    guest_port: int,
    room: asyncio.Semaphore,
    relays: asyncio.TaskGroup,
) -> None:
    loop = asyncio.get_running_loop()

    def let_go(client: socket.socket, _: object = None) -> None:
        client.close()
        room.release()

    while True:
        try:
            client, _ = await loop.sock_accept(listener)
        except OSError as error:  # no descriptor is free, or who connected is gone
            log.warning("published port %d: %s", guest_port, error.strerror)
            await asyncio.sleep(RETRY)
            continue
        try:
            # Unless all goes well: half an answer must not pass for a whole one.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            await room.acquire()  # while there is none, all others wait in the backlog
        except BaseException:
            client.close()
            raise
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
