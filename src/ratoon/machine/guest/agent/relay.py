"""The guest's end of its volumes: a process that carries a connection to the host and back.

The kernel's NFS client connects to a port of the loopback; what it says goes over a virtio-serial
port of its own. This is not the agent's work: the agent uses files on volumes itself, and then has
to wait for what this carries.

A session begins as the agent's does: the host sends MARKER and a nonce, this forgets all that was
under way, closes the connection and answers the same. The kernel connects again, and repeats what
it had asked.
"""

from __future__ import annotations

import os
import select
import socket
import struct

from ..shared import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

PORT_NAME = "ratoon.volumes"
CHUNK = 256 * 1024
PAGE = 4096
#: What one write to the port takes at most.
PORT_CHUNK = 32 * 1024
#: With this many bytes waiting, no more is read where they come from.
LIMIT = 1024 * 1024
#: Root's alone: the kernel connects from one of these.
RESERVED_PORTS = 1024
_RESET = struct.pack("ii", 1, 0)  # struct linger: close at once, and say so


class Relay:
    """One connection at a time: a newer one takes the place of an older one."""

    def __init__(self, port: int, listener: socket.socket) -> None:
        self._port = port
        self._listener = listener
        self._decoder = wire.Decoder()
        self._synced = False
        self._to_host = bytearray(wire.MARKER + wire.HELLO)
        self._to_kernel = bytearray()
        self._connection: socket.socket | None = None
        #: Of the connection: what comes for another one is too late.
        self._number = int.from_bytes(os.urandom(3), "big")
        #: No host is there, as far as is known.
        self._away = False
        self._epoll = select.epoll()
        self._watched: dict[int, int] = {}
        #: What is to be waited for may have.
        self._changed = True

    def run(self) -> NoReturn:
        # All that is done with files comes by here twice: so as little as can be is done each time.
        while True:
            self._flush()
            if self._changed:
                self._watch()
            for fd, events in self._epoll.poll():
                if fd == self._port:
                    if self._away != bool(events & select.EPOLLHUP):
                        self._away, self._changed = not self._away, True
                    self._hear_host()
                elif fd == self._listener.fileno():
                    self._accept()
                elif self._connection is not None and fd == self._connection.fileno():
                    self._hear_kernel()

    def _watch(self) -> None:
        """Wait for what there is room for, and to be rid of what waits."""
        events = select.EPOLLIN if len(self._to_kernel) < LIMIT else 0
        # A port whose host is away says so for as long as it is: that is heard once.
        events |= (select.EPOLLOUT if self._to_host else 0) | (select.EPOLLET if self._away else 0)
        wanted = {self._port: events}
        if self._synced:
            wanted[self._listener.fileno()] = select.EPOLLIN
        if self._connection is not None:
            events = select.EPOLLIN if len(self._to_host) < LIMIT else 0
            wanted[self._connection.fileno()] = events | (select.EPOLLOUT if self._to_kernel else 0)
        for fd in [fd for fd in self._watched if fd not in wanted]:
            self._epoll.unregister(fd)
            del self._watched[fd]
        for fd, events in wanted.items():
            if fd not in self._watched:
                self._epoll.register(fd, events)
            elif self._watched[fd] != events:
                self._epoll.modify(fd, events)
            self._watched[fd] = events
        self._changed = bool(self._to_host or self._to_kernel)

    # The host -------------------------------------------------------------------------------------

    def _hear_host(self) -> None:
        data = self._read_page()
        frame = self._decoder.only_frame(data) if self._synced else None
        if frame is not None:
            self._take(*frame)
            return
        while data:
            self._hear(data + self._read_on())
            if len(self._to_kernel) >= LIMIT:
                break
            data = self._read_page()

    def _hear(self, data: bytes) -> None:
        self._decoder.feed(data)
        nonce = self._decoder.sync()
        if nonce is not None:
            self._hang_up()
            self._synced = self._changed = True
            self._to_host = bytearray(wire.MARKER + nonce)
        if not self._synced:
            self._decoder.discard()
            return
        try:
            for frame in self._decoder.frames():
                self._take(*frame)
        except wire.ProtocolError:
            self._synced = False
            self._hang_up()
            self._decoder.discard()
            self._to_host = bytearray(wire.MARKER + wire.HELLO)
        self._flush()

    def _take(self, number: int, kind: int, payload: bytes) -> None:
        if kind == wire.STDIN and number == self._number:
            self._to_kernel += payload

    def _read_page(self) -> bytes:
        """What a read gives: a page at most. b"": nothing, or no host is there."""
        try:
            return os.read(self._port, PAGE)
        except BlockingIOError:
            return b""

    def _read_on(self) -> bytes:
        """What more there is; what is done for each page adds up."""
        pieces: list[bytes] = []
        while len(pieces) < CHUNK // PAGE and (piece := self._read_page()):
            pieces.append(piece)
        return b"".join(pieces)

    def _flush(self) -> None:
        while self._to_host:
            try:
                written = os.write(self._port, self._to_host[:PORT_CHUNK])  # 0: no host is there
            except BlockingIOError:
                written = 0
            if not written:
                self._changed = True
                break
            del self._to_host[:written]
        while self._to_kernel and self._connection is not None:
            try:
                sent = self._connection.send(self._to_kernel)
            except BlockingIOError:
                self._changed = True
                break
            except OSError:
                self._hang_up()
                break
            del self._to_kernel[:sent]

    # The kernel -----------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, (_, port) = self._listener.accept()
        except OSError:  # it is gone again
            return
        if port >= RESERVED_PORTS:
            connection.close()
            return
        self._hang_up()
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._changed = connection, True
        self._number = (self._number + 1) & 0x7FFFFFFF

    def _hear_kernel(self) -> None:
        assert self._connection is not None
        try:
            data = self._connection.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._to_host += wire.encode(self._number, wire.STDOUT, data)
        else:
            self._hang_up()

    def _hang_up(self) -> None:
        self._changed = True
        if self._connection is not None:
            if self._watched.pop(self._connection.fileno(), None) is not None:
                self._epoll.unregister(self._connection.fileno())
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._connection.close()
            self._connection = None
        self._to_kernel.clear()
