"""Bytes to a daemon and from it. Written by hand, as its counterpart is."""

from __future__ import annotations

import socket
from contextlib import suppress
from select import POLLIN, poll
from typing import Self

from ratoon.client.address import CONNECT_TIMEOUT, Address
from ratoon.client.problems import ConnectionLost, unreachable

#: Bytes that are read at once.
_PIECE = 256 * 1024


class Transport:
    """A connection, over a unix socket, TCP or TLS."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    @classmethod
    def open(cls, address: Address) -> Self:
        """Unreachable: nobody is there."""
        try:
            connected = _connected(address)
        except OSError as error:
            raise unreachable(address, error) from error
        connected.settimeout(None)
        return cls(connected)

    @property
    def is_open(self) -> bool:
        """Whether the daemon has not closed it: an end is something to be read."""
        readable = poll()
        readable.register(self._socket, POLLIN)
        return not readable.poll(0)

    def read(self) -> bytes:
        """What has come, as soon as there is some; b"" at the end."""
        try:
            return self._socket.recv(_PIECE)
        except OSError:
            return b""

    def write(self, data: bytes) -> None:
        """Waits until all of it is on its way. ConnectionLost."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def close(self) -> None:
        """Another thread that reads or writes does so no more."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def _connected(address: Address) -> socket.socket:
    if address.socket:
        local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            local.settimeout(CONNECT_TIMEOUT)
            local.connect(address.socket)
        except BaseException:
            local.close()
            raise
        return local
    host, port = address.host_and_port
    plain = socket.create_connection((host, port), CONNECT_TIMEOUT)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return address.tls.wrap_socket(plain, server_hostname=host) if address.tls else plain
    except BaseException:
        plain.close()
        raise
