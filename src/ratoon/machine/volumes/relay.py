"""The host's end of a guest's volumes: a thread that answers what the guest's kernel asks.

It speaks with the relay in the guest over a virtio-serial port (`guest.agent.relay`), in the frames
that the agent has too. It is a thread, not a task: files block, and one guest's wait is no other's.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ratoon.errors import GuestError
from ratoon.machine.guest.shared import wire
from ratoon.machine.volumes.callers import prepare_thread
from ratoon.machine.volumes.export import Export
from ratoon.machine.volumes.nfs import ONCE, PROGRAM, VERSION, Nfs
from ratoon.machine.volumes.rpc import Dispatcher, Records
from ratoon.machine.volumes.xdr import Garbage

log = logging.getLogger(__name__)

_CHUNK = 256 * 1024


class VolumeServer:
    """Answers one guest from when it is made until it is closed, or the guest's machine is gone."""

    def __init__(self, name: str, path: Path, exports: Mapping[bytes, Export]) -> None:
        """`path` is the port's socket; `exports` are the guest's volumes by id. GuestError."""
        self._name = name
        #: Whether the guest may write to any of them.
        self.writable = not all(export.read_only for export in exports.values())
        self._dispatcher = Dispatcher(PROGRAM, VERSION, Nfs(exports), ONCE)
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise GuestError(f"cannot reach the volumes of {name}: {error}") from error
        self._decoder = wire.Decoder()
        self._nonce: bytes | None = None
        #: The connection that the guest's kernel has, by the relay's number, and its bytes so far.
        self._connection: int | None = None
        self._records = Records()
        self._thread = threading.Thread(target=self._serve, name=f"volumes of {name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it, and wait for what is under way; safe to repeat."""
        with suppress(OSError):  # it is over there, too
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _serve(self) -> None:
        try:
            with self._socket:
                prepare_thread()
                self._begin()
                while data := self._socket.recv(_CHUNK):
                    self._hear(data)
        except OSError:  # the machine is gone, or this was closed
            pass
        except Exception:
            log.exception("sandbox %s: its volumes are not served any more", self._name)

    def _begin(self) -> None:
        """Begin a session: whatever the relay was saying is dropped, and the kernel repeats it."""
        self._nonce = os.urandom(wire.NONCE_BYTES)
        self._connection = None
        self._socket.sendall(wire.MARKER + self._nonce)

    def _hear(self, data: bytes) -> None:
        self._decoder.feed(data)
        nonce = self._decoder.sync()
        if nonce == self._nonce and nonce is not None:
            self._nonce = None
        elif nonce == wire.HELLO:
            self._begin()
        if self._nonce is not None:
            self._decoder.discard()
            return
        try:
            for number, kind, payload in self._decoder.frames():
                if kind != wire.STDOUT:
                    raise wire.ProtocolError(f"a frame of kind {kind}")
                self._answer(number, payload)
        except (wire.ProtocolError, Garbage) as error:
            log.debug("sandbox %s sent nonsense for its volumes: %s", self._name, error)
            self._decoder.discard()
            self._begin()

    def _answer(self, number: int, payload: bytes) -> None:
        if number != self._connection:
            self._connection, self._records = number, Records()
        for record in self._records.feed(payload):
            self._socket.sendall(wire.encode(number, wire.STDIN, self._dispatcher.answer(record)))
