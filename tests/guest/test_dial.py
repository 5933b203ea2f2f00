"""Connections made inside the guest: both halves, slow readers, and nobody there."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from channel_on_host import Guest, guest_on_host, until

from ratoon.errors import GuestError, GuestTimeout, InvalidInput
from ratoon.machine.guest import commands
from ratoon.machine.guest.channel import GuestStream
from ratoon.machine.guest.shared import wire
from ratoon.units import MIB

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    async with guest_on_host() as guest:
        before = guest.agent.descriptors
        yield guest
        await until(lambda: guest.agent.descriptors == before)


@asynccontextmanager
async def serving(serve: Serve, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A server on the loopback of the agent, which is this host's; its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(answer, host, 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def receive(stream: GuestStream) -> bytes:
    """All that comes until the other side ends its half."""
    data = bytearray()
    async with asyncio.timeout(60):
        while (piece := await stream.read()) is not None and piece[1]:
            assert piece[0] == wire.STDOUT
            data += piece[1]
    return bytes(data)


async def test_a_server_that_knows_ipv6_alone(guest: Guest) -> None:
    async with serving(echo, "::1") as port:
        async with commands.dial(guest.channel, port) as stream:
            await stream.write(b"hello")
            stream.end_input()
            assert await receive(stream) == b"hello"
        with pytest.raises(GuestError, match=f"127.0.0.1, port {port}") as refused:
            async with commands.dial(guest.channel, port, host="127.0.0.1"):
                pass
        assert refused.value.kind == "refused"


async def test_both_ways(guest: Guest) -> None:
    data = random.Random(1).randbytes(5 * MIB) + wire.MARKER
    async with serving(echo) as port, commands.dial(guest.channel, port) as stream:
        async with asyncio.TaskGroup() as group:
            receiving = group.create_task(receive(stream))
            await stream.write(data)
            stream.end_input()
        assert receiving.result() == data
        assert await stream.read() is None
        assert await stream.result() == {}


async def test_the_host_ends_its_half_first(guest: Guest) -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d" % len(await reader.read()))

    async with serving(count) as port, commands.dial(guest.channel, port) as stream:
        await stream.write(bytes(100_000))
        stream.end_input()
        assert await receive(stream) == b"100000"
        assert await stream.read() is None


async def test_the_other_side_ends_its_half_first(guest: Guest) -> None:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"welcome")
        writer.write_eof()
        heard.set_result(await reader.read())

    async with serving(greet) as port, commands.dial(guest.channel, port) as stream:
        assert await receive(stream) == b"welcome"
        for word in (b"still ", b"talking"):
            await stream.write(word)
        stream.end_input()
        assert await heard == b"still talking"
        assert await stream.read() is None


async def test_a_reader_that_takes_its_time_holds_up_the_other_side_alone(guest: Guest) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while sent < 30 * MIB:
            writer.write(bytes(64 * 1024))
            await writer.drain()
            sent += 64 * 1024

    resident = guest.agent.resident_bytes
    async with (
        serving(flood) as port,
        serving(echo) as other,
        commands.dial(guest.channel, port) as slow,
    ):
        await until(lambda: sent > wire.OUTPUT_WINDOW)
        async with commands.dial(guest.channel, other) as quick:
            await quick.write(b"hello")
            quick.end_input()
            assert await receive(quick) == b"hello"
        assert sent < 30 * MIB
        assert guest.agent.resident_bytes - resident < 8 * MIB
        slow.end_input()
        assert len(await receive(slow)) == 30 * MIB


async def test_the_other_side_takes_its_time(guest: Guest) -> None:
    go = asyncio.Event()
    digest = sha256()

    async def dawdle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await go.wait()
        while data := await reader.read(1 << 16):
            digest.update(data)

    data = random.Random(2).randbytes(20 * MIB)
    async with serving(dawdle) as port, commands.dial(guest.channel, port) as stream:
        writing = asyncio.create_task(stream.write(data))
        await guest.channel.request("hello", timeout=20)
        assert not writing.done()
        go.set()
        await writing
        stream.end_input()
        assert await receive(stream) == b""
    assert digest.digest() == sha256(data).digest()


async def test_the_other_side_is_gone_while_it_is_written_to(guest: Guest) -> None:
    async def vanish(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(10)
        writer.transport.abort()

    async with serving(vanish) as port, commands.dial(guest.channel, port) as stream:
        async with asyncio.timeout(20):
            await stream.write(bytes(2 * MIB))
        with pytest.raises(GuestError) as caught:
            await stream.result()
        assert caught.value.kind == "reset"


async def test_nobody_listens(guest: Guest) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # so that nobody else does
        with pytest.raises(GuestError, match="Connection refused") as caught:
            async with commands.dial(guest.channel, unheard.getsockname()[1]):
                pass
    assert caught.value.kind == "refused"


async def test_there_is_no_way_to_it() -> None:
    """The agent is in a network namespace of its own, in which not even the loopback is up."""
    leave = "import ctypes; assert ctypes.CDLL(None).unshare(0x40000000) == 0"
    async with guest_on_host(before=leave) as guest:
        with pytest.raises(GuestError, match="Network is unreachable") as caught:
            async with commands.dial(guest.channel, 80, host="192.0.2.1"):
                pass
        assert caught.value.kind == "unreachable"


async def test_nobody_answers(guest: Guest) -> None:
    """A queue that is full: the kernel drops what asks for a place in it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        expected = pytest.raises(
            GuestTimeout, match=f"sb-test did not report a .*port {address[1]}"
        )
        with socket.create_connection(address), expected:
            async with commands.dial(guest.channel, address[1], timeout=0.3):
                pass


@pytest.mark.parametrize("host", ["localhost", "example.org", "", "1.2.3", "::g", "127.0.0.1:80"])
async def test_names_are_nobody_s_to_look_up(guest: Guest, host: str) -> None:
    with pytest.raises(GuestError, match="no address of digits"):
        async with commands.dial(guest.channel, 80, host=host):
            pass


@pytest.mark.parametrize("port", [0, -1, 65536])
async def test_ports_that_do_not_exist(guest: Guest, port: int) -> None:
    with pytest.raises(InvalidInput, match=f"no port {port}"):
        async with commands.dial(guest.channel, port):
            pass


async def test_a_socket_in_the_file_system(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    server = await asyncio.start_unix_server(echo_and_close, path)
    async with server, guest.channel.open("dial", path=str(path)) as stream:
        await stream.write(b"hello")
        stream.end_input()
        assert await receive(stream) == b"hello"
    with pytest.raises(GuestError, match="No such file") as caught:
        async with guest.channel.open("dial", path=str(tmp_path / "none")) as stream:
            await stream.started()
    assert caught.value.kind == "refused"


async def echo_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await echo(reader, writer)
    writer.close()


async def test_leaving_closes_the_connection(guest: Guest) -> None:
    gone = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read(5) == b"hello"
        assert await reader.read() == b""
        gone.set()

    async with serving(wait) as port:
        async with commands.dial(guest.channel, port) as stream:
            await stream.write(b"hello")
        async with asyncio.timeout(20):
            await gone.wait()


async def test_a_new_session_closes_the_connections_of_the_old_one(guest: Guest) -> None:
    gone = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        gone.set()

    async with serving(wait) as port, commands.dial(guest.channel, port):
        await guest.again()
        async with asyncio.timeout(20):
            await gone.wait()
