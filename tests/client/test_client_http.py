"""HTTP as both libraries speak it, to a peer made by hand that does what a daemon seldom does."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from both_libraries import Libraries
from ratoon import Client
from ratoon.client.address import Known, parse
from ratoon.client.aio.connection import AsyncConnection
from ratoon.client.sync.connection import Connection
from ratoon.errors import InvalidInput, Unreachable

DEADLINE = 60.0

#: What a peer does with one connection.
Talk = Callable[[socket.socket], None]


@pytest.fixture(params=["asyncio", "threads"])
def library(request: pytest.FixtureRequest) -> Libraries:
    return Libraries(request.param)


@contextmanager
def peer(path: Path, *talks: Talk) -> Iterator[str]:
    """The URL of one that has these connections, one after the other; each is closed then."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with serving(listener, *talks):
            yield f"unix://{path}"


@contextmanager
def serving(listener: socket.socket, *talks: Talk) -> Iterator[None]:
    """The same for a socket that is there."""
    failures: list[BaseException] = []
    listener.settimeout(DEADLINE)

    def serve() -> None:
        try:
            for talk in talks:
                connected, _ = listener.accept()
                with connected:
                    connected.settimeout(DEADLINE)
                    talk(connected)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    assert not failures


def head(connected: socket.socket) -> bytes:
    """The head of a request; what follows it was not sent yet."""
    heard = b""
    while not heard.endswith(b"\r\n\r\n"):
        piece = connected.recv(1)
        assert piece, heard
        heard += piece
    return heard


def answer(status: str = "200 OK", **fields: object) -> bytes:
    body = json.dumps(fields).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


def versions(*names: str) -> Talk:
    """Answers so many requests."""

    def talk(connected: socket.socket) -> None:
        for name in names:
            assert head(connected).startswith(b"GET /version HTTP/1.1\r\n")
            connected.sendall(answer(version=name))

    return talk


async def test_it_is_found_by_its_number(library: Libraries) -> None:
    """IPv6 has brackets in the URL, and in the Host field, and nowhere else."""
    heard: list[bytes] = []

    def talk(connected: socket.socket) -> None:
        heard.append(head(connected))
        connected.sendall(answer(version="6"))

    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        place = f"[::1]:{listener.getsockname()[1]}"
        with serving(listener, talk):
            async with library.AsyncClient(f"http://{place}", token="0123456789abcdef") as client:
                assert await client.version() == "6"
    assert f"\r\nhost: {place}\r\n".encode() in heard[0].lower()
    assert b"\r\nauthorization: Bearer 0123456789abcdef\r\n" in heard[0]


async def test_a_connection_is_used_again_until_its_peer_closes(
    tmp_path: Path, library: Libraries
) -> None:
    closed = threading.Event()

    def first(connected: socket.socket) -> None:
        versions("1", "2")(connected)
        connected.close()
        closed.set()

    with peer(tmp_path / "sock", first, versions("3")) as url:
        async with library.AsyncClient(url) as client:
            assert [await client.version() for _ in range(2)] == ["1", "2"]
            assert closed.wait(DEADLINE)
            assert await client.version() == "3"


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", answer(version="1")[:-1], b"nonsense\r\n\r\n"]
)
async def test_an_answer_that_is_none(tmp_path: Path, library: Libraries, said: bytes) -> None:
    def talk(connected: socket.socket) -> None:
        head(connected)
        connected.sendall(said)

    with peer(tmp_path / "sock", talk) as url:
        async with library.AsyncClient(url) as client:
            with pytest.raises(Unreachable, match="went away before it had answered"):
                await client.version()


def refuse(connected: socket.socket) -> None:
    """Say so in the middle of what is sent."""
    assert b"transfer-encoding: chunked" in head(connected)
    connected.recv(100_000)
    connected.sendall(answer("422 Unprocessable", error="it is too large", kind="InvalidInput"))
    while connected.recv(100_000):
        pass


async def test_who_refuses_in_the_middle_is_heard(tmp_path: Path) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(100_000)

    with peer(tmp_path / "sock", refuse) as url:
        connection = AsyncConnection(Known(parse(url, None)))
        with pytest.raises(InvalidInput, match="it is too large"):
            await connection.ask("PUT", "/file", content=pieces())
        await connection.close()


def test_who_refuses_in_the_middle_is_heard_without_asyncio(tmp_path: Path) -> None:
    with peer(tmp_path / "sock", refuse) as url:
        connection = Connection(Known(parse(url, None)))
        with pytest.raises(InvalidInput, match="it is too large"):
            connection.ask("PUT", "/file", content=(bytes(100_000) for _ in range(100)))
        connection.close()


def test_what_cannot_be_read_here_is_not_the_daemons_fault(tmp_path: Path) -> None:
    ended: list[bytes] = []

    def talk(connected: socket.socket) -> None:
        head(connected)
        while piece := connected.recv(100):
            ended.append(piece)

    def pieces() -> Iterator[bytes]:
        yield b"begun"
        raise OSError("the disk is gone")

    with peer(tmp_path / "sock", talk) as url:
        connection = Connection(Known(parse(url, None)))
        with pytest.raises(OSError, match="the disk is gone"):
            connection.ask("PUT", "/file", content=pieces())
        connection.close()
    assert b"".join(ended) == b"5\r\nbegun\r\n"


def test_closing_wakes_who_waits_in_another_thread(tmp_path: Path) -> None:
    asked = threading.Event()
    outcome: list[BaseException] = []

    def talk(connected: socket.socket) -> None:
        head(connected)
        asked.set()
        assert connected.recv(1) == b""

    def ask() -> None:
        try:
            client.version()
        except BaseException as error:
            outcome.append(error)

    with peer(tmp_path / "sock", talk) as url:
        client = Client(url)
        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(DEADLINE)
        client.close()
        thread.join(DEADLINE)
    assert [type(error) for error in outcome] == [Unreachable]


async def test_what_is_large_is_not_held(tmp_path: Path, library: Libraries) -> None:
    """Who takes nothing lets the peer wait: sockets and one piece are all there is between."""
    stuck = threading.Event()

    def talk(connected: socket.socket) -> None:
        head(connected)
        connected.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        connected.setblocking(False)
        sent, room = 0, select.poll()
        room.register(connected, select.POLLOUT)
        while room.poll(1000):  # for as long as somebody takes it
            sent += connected.send(bytes(100_000))
            assert sent < 100_000_000
        stuck.set()

    with peer(tmp_path / "sock", talk) as url:
        async with library.AsyncClient(url) as client, client.events():
            assert await asyncio.to_thread(stuck.wait, DEADLINE)


CHUNKED = (
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'4\r\n{"ve\r\nE\r\nrsion": "1.5"}\r\n0\r\n\r\n'
)


@given(st.lists(st.integers(1, len(CHUNKED) - 1), unique=True).map(sorted))
def test_an_answer_may_come_in_any_pieces(cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        connection: Any = Connection(Known(parse("http://localhost", None)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ratoon.client.sync.transport._connected", lambda address: ours)

            def talk() -> None:
                head(theirs)
                for start, end in zip([0, *cuts], [*cuts, len(CHUNKED)], strict=True):
                    theirs.sendall(CHUNKED[start:end])

            thread = threading.Thread(target=talk)
            thread.start()
            try:
                assert connection.ask("GET", "/version") == {"version": "1.5"}
            finally:
                thread.join()
                connection.close()
