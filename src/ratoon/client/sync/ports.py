# Made from ../aio/ports.py by scripts/make_sync.py: change it there.
"""Ports of a sandbox: published on the daemon's host, or connected to from here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ratoon.api.answers import PublishedPort, read
from ratoon.client.sync.connection import Connection, begun
from ratoon.client.sync.conversations import Conversation

PublishedPorts = list[PublishedPort]

#: Bytes in one message.
_CHUNK = 64 * 1024


class Dialled:
    """A TCP connection that was made within the guest."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk
        self._over = False

    def send(self, data: bytes) -> None:
        """Send all of it; waits while the guest does not take it."""
        for start in range(0, len(data), _CHUNK):
            self._talk.send(data[start : start + _CHUNK])

    def end(self) -> None:
        """No more will be sent; there may be more to receive."""
        self._talk.send_json(eof=True)

    def receive(self) -> bytes:
        """What comes next; empty once no more will come. GuestError: it was reset."""
        if not self._over:
            message = self._talk.receive()
            if isinstance(message, bytes):
                return message
            self._over = True
        return b""


class Ports:
    """The ports of one sandbox: `sandbox.ports`. What listens may listen on the guest's loopback.

    No network policy has a say in them.
    """

    def __init__(self, connection: Connection, path: str) -> None:
        self._connection = connection
        self._sandbox = path
        self._path = f"{path}/ports"

    def publish(
        self, guest_port: int, host_port: int | None = None, address: str | None = None
    ) -> PublishedPort:
        """Have a port of the daemon's host (None: any) lead to one in the guest.

        `address`: an address of that host, in digits; None: its loopback. Nobody need listen in the
        guest yet. Conflict: the host's port is taken.
        """
        body = {"guest_port": guest_port, "host_port": host_port, "address": address}
        return read(PublishedPort, self._connection.ask("POST", self._path, body=body))

    def list(self) -> PublishedPorts:
        """Those that are published."""
        return read(PublishedPorts, self._connection.ask("GET", self._path))

    def unpublish(self, guest_port: int) -> None:
        """Close the ports that lead there, and their connections. NotFound: there are none."""
        self._connection.ask("DELETE", f"{self._path}/{guest_port}")

    @contextmanager
    def dial(self, guest_port: int) -> Iterator[Dialled]:
        """A TCP connection from within the guest to a port of its loopback.

        It is closed with the block. GuestError: nobody listens there.
        """
        path = f"{self._sandbox}/dial/{guest_port}"
        with self._connection.converse(path) as talk:
            begun(talk)
            yield Dialled(talk)
