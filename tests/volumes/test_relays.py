"""Both ends of what carries volumes, over a socket in place of the machine's port."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from nfs_client import KEY, OK, Guest, answered

from ratoon.machine.guest.shared import wire
from ratoon.machine.volumes.export import Export
from ratoon.machine.volumes.relay import VolumeServer
from ratoon.machine.volumes.xdr import Writer

PACKAGE = Path(wire.__file__).parent.parent.parent
#: Runs the relay on a port and a listener that it inherits.
DRIVER = """
import socket, sys
sys.path.insert(0, sys.argv[1])
from guest.agent import relay
relay.Relay(int(sys.argv[2]), socket.socket(fileno=int(sys.argv[3]))).run()
"""


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Export]:
    (tmp_path / "volume").mkdir()
    export = Export(tmp_path / "volume", KEY, read_only=False)
    yield export
    export.close()


class Port:
    """A unix socket where the machine's would be; who connects is handed on to `accept`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(20)

    def accept(self) -> socket.socket:
        connection, _ = self._listener.accept()
        connection.settimeout(20)
        return connection

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[Port]:
    port = Port(tmp_path / "port")
    yield port
    port.close()


class Peer:
    """The relay's part, by hand."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._decoder = wire.Decoder()

    def synchronised(self) -> None:
        """Hear of a session, and begin it."""
        nonce = None
        while nonce is None:
            self._decoder.feed(self.socket.recv(65536))
            nonce = self._decoder.sync()
        self.socket.sendall(wire.MARKER + nonce)

    def say(self, number: int, data: bytes) -> None:
        self.socket.sendall(wire.encode(number, wire.STDOUT, data))

    def hear(self) -> tuple[int, bytes]:
        while True:
            for number, kind, payload in self._decoder.frames():
                assert kind == wire.STDIN
                return number, payload
            self._decoder.feed(self.socket.recv(65536))


def marked(record: bytes) -> bytes:
    return (len(record) | 1 << 31).to_bytes(4, "big") + record


def test_the_server_begins_again_whenever_it_hears_nonsense(port: Port, export: Export) -> None:
    server = VolumeServer("test", port.path, {export.id: export})
    guest = Guest(export)
    question = marked(guest.record("getattr", Writer().opaque(export.handles.root).done()))
    try:
        with port.accept() as connection:
            peer = Peer(connection)
            peer.synchronised()
            for nonsense in (
                b"\x7f" * 100,  # no frame
                wire.encode(1, wire.STDIN, b"of the other direction"),
                wire.encode(1, wire.STDOUT, b"\xff" * 50),  # a record that is too long
                wire.encode(1, wire.STDOUT, marked(b"no call, to be sure")),
                wire.MARKER + wire.HELLO,
            ):
                peer.say(7, question)
                number, reply = peer.hear()
                assert (number, answered(reply)[0]) == (7, OK)
                connection.sendall(nonsense)
                peer.synchronised()
            # Half a record of a connection is nothing to the next one.
            peer.say(8, question[:20])
            peer.say(9, question)
            assert peer.hear()[0] == 9
    finally:
        server.close()
    server.close()


def test_a_guest_that_takes_no_answers_does_not_hold_up_the_end(port: Port, export: Export) -> None:
    (export.source / "large").write_bytes(bytes(1 << 18))
    server = VolumeServer("test", port.path, {export.id: export})
    guest = Guest(export)
    with port.accept() as connection:
        peer = Peer(connection)
        peer.synchronised()
        handle = guest.lookup(export.handles.root, b"large")
        arguments = Writer().opaque(handle).u64(0).u32(1 << 18).done()
        connection.settimeout(1)
        with suppress(TimeoutError):
            for _ in range(1000):
                peer.say(1, marked(guest.record("read", arguments)))
        server.close()  # it was blocked: it has more to say than a socket holds


@pytest.fixture
def guest_relay() -> Iterator[tuple[socket.socket, socket.socket, tuple[str, int]]]:
    """The host's end of a relay's port, and where the kernel would connect."""
    host, theirs = socket.socketpair()
    theirs.setblocking(False)
    host.settimeout(20)
    with socket.create_server(("127.0.0.1", 0)) as listener, theirs, host:
        listener.setblocking(False)
        fds = [theirs.fileno(), listener.fileno()]
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", DRIVER, str(PACKAGE), *map(str, fds)], pass_fds=fds
        )
        try:
            yield host, theirs, listener.getsockname()
        finally:
            process.kill()
            process.wait()


def kernel(address: tuple[str, int], port: int) -> socket.socket:
    """A connection as the kernel's: from a port that only root has."""
    while True:
        connection = socket.socket()
        connection.settimeout(20)
        try:
            connection.bind(("127.0.0.1", port))
            connection.connect(address)
        except OSError:  # it is taken
            connection.close()
            port += 1
            continue
        return connection


def begin(host: socket.socket) -> wire.Decoder:
    nonce = os.urandom(wire.NONCE_BYTES)
    host.sendall(wire.MARKER + nonce)
    decoder = wire.Decoder()
    while True:
        decoder.feed(host.recv(65536))
        if decoder.sync() == nonce:
            return decoder
        decoder.discard()


def heard(host: socket.socket, decoder: wire.Decoder, wanted: bytes) -> int:
    """Which connection said `wanted`, and nothing else."""
    said, numbers = b"", set()
    while said != wanted:
        for number, kind, payload in decoder.frames():
            assert kind == wire.STDOUT
            said += payload
            numbers.add(number)
        if said != wanted:
            decoder.feed(host.recv(65536))
    (number,) = numbers
    return number


def test_the_relay_carries_one_connection_of_the_kernels(
    guest_relay: tuple[socket.socket, socket.socket, tuple[str, int]],
) -> None:
    host, _, address = guest_relay
    decoder = begin(host)
    data = os.urandom(300_000)
    with kernel(address, 700) as first:
        first.sendall(data)
        number = heard(host, decoder, data)
        host.sendall(wire.encode(number, wire.STDIN, data))
        back = b""
        while len(back) < len(data):
            back += first.recv(65536)
        assert back == data
        # A program that is not root's is not heard.
        with socket.create_connection(address) as stranger:
            stranger.settimeout(20)
            assert stranger.recv(1) == b""
        with kernel(address, 800) as second:
            second.sendall(b"newer")
            newer = heard(host, decoder, b"newer")
            assert newer != number
            host.sendall(wire.encode(number, wire.STDIN, b"too late"))
            host.sendall(wire.encode(newer, wire.STDIN, b"in time"))
            assert second.recv(100) == b"in time"
            with suppress(ConnectionResetError):
                assert first.recv(1) == b""
            # As after a fork: another host connects, and all that was under way is void.
            second.sendall(b"half a reco")
            decoder = begin(host)
            with suppress(ConnectionResetError):
                assert second.recv(1) == b""
    with kernel(address, 900) as third:
        third.sendall(b"the same once more")
        heard(host, decoder, b"the same once more")


def test_the_relay_asks_for_a_session(
    guest_relay: tuple[socket.socket, socket.socket, tuple[str, int]],
) -> None:
    host, _, _ = guest_relay
    decoder = wire.Decoder()
    nonce = None
    while nonce is None:
        assert select.select([host], [], [], 20)[0]
        decoder.feed(host.recv(65536))
        nonce = decoder.sync()
    assert nonce == wire.HELLO
    begin(host)
    host.sendall(b"\x7f" * 64)  # no frame: it asks again
    decoder, nonce = wire.Decoder(), None
    while nonce is None:
        decoder.feed(host.recv(65536))
        nonce = decoder.sync()
    assert nonce == wire.HELLO
