"""Published ports: what a client on the host sees of a server in a guest, played here."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest

from ratoon.api.answers import PublishedPort
from ratoon.errors import Conflict, GuestError, InvalidInput, MachineDied, NotFound
from ratoon.machine.network import ports as module
from ratoon.machine.network.ports import HeldPort, Ports

FOR_EVER = 60
#: Pieces under way to the guest, as its credit limits them.
CREDIT = 4


class Talk:
    """A conversation. The relay has one end of it; `heard`, `say` and `over` are the guest's."""

    def __init__(self) -> None:
        self._to_guest: asyncio.Queue[bytes] = asyncio.Queue()
        self._to_host: asyncio.Queue[bytes | None] = asyncio.Queue(CREDIT)
        self._room = asyncio.Semaphore(CREDIT)
        self.refusal = ""

    async def read(self) -> tuple[int, bytes] | None:
        data = await self._to_host.get()
        return None if data is None else (17, data)

    async def result(self) -> object:
        if self.refusal:
            raise GuestError(self.refusal)
        return {}

    async def write(self, data: bytes) -> None:
        await self._room.acquire()
        self._to_guest.put_nowait(data)

    def end_input(self) -> None:
        self._to_guest.put_nowait(b"")

    async def heard(self) -> bytes:
        """The next piece; empty at the end of input."""
        data = await self._to_guest.get()
        self._room.release()
        return data

    async def say(self, data: bytes) -> None:
        """Empty: nothing more will be said."""
        await self._to_host.put(data)

    async def over(self) -> None:
        await self._to_host.put(None)


Server = Callable[[Talk], Awaitable[None]]


class Guest:
    """Serves ports; whoever is at none is refused."""

    def __init__(self, **servers: Server) -> None:
        self.servers = {int(name.removeprefix("p")): server for name, server in servers.items()}
        self.open = 0
        self.dialled: Counter[int] = Counter()

    @asynccontextmanager
    async def dial(self, port: int) -> AsyncIterator[Talk]:
        self.dialled[port] += 1
        talk = Talk()
        serving = asyncio.create_task(self._serve(port, talk))
        self.open += 1
        try:
            yield talk
        finally:
            self.open -= 1
            serving.cancel()
            await asyncio.wait({serving})

    async def _serve(self, port: int, talk: Talk) -> None:
        if server := self.servers.get(port):
            await server(talk)
        else:
            talk.refusal = f"nobody listens on port {port}"
        await talk.over()


async def echo(talk: Talk) -> None:
    while data := await talk.heard():
        await talk.say(data)


@asynccontextmanager
async def publishing(guest: Guest) -> AsyncIterator[Ports]:
    ports = Ports(guest.dial)
    tasks = asyncio.all_tasks()
    try:
        async with asyncio.timeout(FOR_EVER):
            yield ports
    finally:
        await ports.close()
    assert ports.published == ()
    assert guest.open == 0
    assert asyncio.all_tasks() == tasks


@asynccontextmanager
async def client(port: PublishedPort) -> AsyncIterator[socket.socket]:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in port.address else socket.AF_INET
    with socket.socket(family) as connection:
        connection.setblocking(False)
        await loop.sock_connect(connection, (port.address, port.host_port))
        yield connection


async def receive_all(connection: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while data := await loop.sock_recv(connection, 65536):
        received += data
    return bytes(received)


async def assert_reset(connection: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        await receive_all(connection)


async def answers(port: PublishedPort) -> bool:
    loop = asyncio.get_running_loop()
    async with client(port) as connection:
        await loop.sock_sendall(connection, b"hello")
        connection.shutdown(socket.SHUT_WR)
        return await receive_all(connection) == b"hello"


async def test_bytes_go_to_and_fro() -> None:
    loop = asyncio.get_running_loop()
    content = os.urandom(3_000_000)
    async with publishing(Guest(p80=echo)) as ports:
        port = ports.publish(80)
        assert ports.published == (port,)
        assert port.guest_port == 80
        async with client(port) as one, client(port) as other:
            sending = asyncio.create_task(loop.sock_sendall(one, content))
            await loop.sock_sendall(other, b"quick")
            assert await loop.sock_recv(other, 100) == b"quick"
            received = bytearray()
            while len(received) < len(content):
                received += await loop.sock_recv(one, 65536)
            await sending
        assert received == content


async def test_who_has_asked_all_still_hears_the_answer() -> None:
    async def upper(talk: Talk) -> None:
        question = b""
        while data := await talk.heard():
            question += data
        await talk.say(question.upper())

    loop = asyncio.get_running_loop()
    async with publishing(Guest(p80=upper)) as ports, client(ports.publish(80)) as connection:
        await loop.sock_sendall(connection, b"what?")
        connection.shutdown(socket.SHUT_WR)
        assert await receive_all(connection) == b"WHAT?"


async def test_a_guest_that_has_said_all_still_listens() -> None:
    heard = bytearray()
    done = asyncio.Event()

    async def listener(talk: Talk) -> None:
        await talk.say(b"go on")
        await talk.say(b"")
        while data := await talk.heard():
            heard.extend(data)
        done.set()

    loop = asyncio.get_running_loop()
    async with publishing(Guest(p80=listener)) as ports, client(ports.publish(80)) as connection:
        assert await receive_all(connection) == b"go on"
        await loop.sock_sendall(connection, b"well")
        connection.shutdown(socket.SHUT_WR)
        await done.wait()
    assert heard == b"well"


async def test_a_guest_that_takes_nothing_holds_up_its_client_alone() -> None:
    async def deaf(talk: Talk) -> None:
        await asyncio.Event().wait()

    loop = asyncio.get_running_loop()
    guest = Guest(p80=deaf, p81=echo)
    async with publishing(guest) as ports, client(ports.publish(80)) as connection:
        sending = asyncio.create_task(loop.sock_sendall(connection, bytes(50_000_000)))
        assert await answers(ports.publish(81))
        done, _ = await asyncio.wait({sending}, timeout=0.5)
        assert not done
        sending.cancel()


async def test_a_client_that_reads_nothing_holds_up_its_server_alone() -> None:
    said = 0

    async def talker(talk: Talk) -> None:
        nonlocal said
        while True:
            await talk.say(bytes(65536))
            said += 65536

    async with publishing(Guest(p80=talker, p81=echo)) as ports, client(ports.publish(80)):
        before = -1
        while said != before:  # until there is no more room
            before = said
            assert await answers(ports.publish(81))
            await asyncio.sleep(0.2)
        assert said < 50_000_000


async def test_a_refused_port_resets_the_connection_and_is_tried_again() -> None:
    guest = Guest()
    async with publishing(guest) as ports:
        port = ports.publish(8080)
        for _ in range(3):
            async with client(port) as connection:
                await assert_reset(connection)
        guest.servers[8080] = echo
        assert await answers(port)
    assert guest.dialled == {8080: 4}


async def test_a_conversation_that_breaks_off_is_a_reset_not_an_end() -> None:
    """Half an answer must not pass for a whole one."""

    async def breaks_off(talk: Talk) -> None:
        await talk.say(b"half an ans")
        talk.refusal = "connection reset by the server"

    guest = Guest(p80=breaks_off)
    async with publishing(guest) as ports, client(ports.publish(80)) as connection:
        await assert_reset(connection)


async def test_a_sandbox_that_is_gone_resets_the_connection() -> None:
    @asynccontextmanager
    async def dial(port: int) -> AsyncIterator[Talk]:
        raise MachineDied("sandbox sb-1 died")
        yield Talk()

    ports = Ports(dial)
    port = ports.publish(80)
    for _ in range(2):
        async with asyncio.timeout(FOR_EVER), client(port) as connection:
            await assert_reset(connection)
    await ports.close()


async def test_a_client_that_breaks_off_ends_the_conversation() -> None:
    async def silent(talk: Talk) -> None:
        await asyncio.Event().wait()

    guest = Guest(p80=silent)
    async with publishing(guest) as ports:
        async with client(ports.publish(80)) as connection:
            while not guest.open:
                await asyncio.sleep(0.01)
            # A reset, instead of a proper end.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        while guest.open:
            await asyncio.sleep(0.01)


async def test_many_clients_at_once_are_all_served() -> None:
    loop = asyncio.get_running_loop()
    guest = Guest(p80=echo)
    async with publishing(guest) as ports, AsyncExitStack() as open_clients:
        port = ports.publish(80)
        clients = [await open_clients.enter_async_context(client(port)) for _ in range(300)]
        for _ in range(2):
            for each in clients:
                await loop.sock_sendall(each, b"hello")
            for each in clients:
                assert await loop.sock_recv(each, 100) == b"hello"
        assert guest.open == 300


async def test_clients_that_find_no_room_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    loop = asyncio.get_running_loop()
    guest = Guest(p80=echo)
    async with publishing(guest) as ports:
        port = ports.publish(80)
        async with client(port) as one, client(port) as two:
            for each in (one, two):
                await loop.sock_sendall(each, b"hello")
                assert await loop.sock_recv(each, 100) == b"hello"
            waiting = [asyncio.create_task(answers(port)) for _ in range(20)]
            done, _ = await asyncio.wait(waiting, timeout=0.2)
            assert (len(done), guest.open) == (0, 2)
            two.close()
            assert await asyncio.gather(*waiting) == [True] * 20
        assert await answers(port)
    assert guest.dialled == {80: 23}


async def test_who_waits_for_room_is_reset_when_the_port_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 1)
    guest = Guest(p80=echo)
    async with publishing(guest) as ports:
        port = ports.publish(80)
        async with client(port) as one, client(port) as two, client(port) as three:
            while not guest.open:
                await asyncio.sleep(0.01)
            await ports.unpublish(port)
            for each in (one, two, three):
                await assert_reset(each)


async def test_a_host_short_of_descriptors_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RETRY", 0.01)
    loop = asyncio.get_running_loop()
    accept = loop.sock_accept
    failures = [OSError(errno.EMFILE, "Too many open files")] * 3

    async def short(listener: socket.socket) -> object:
        if failures:
            raise failures.pop()
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", short)
    async with publishing(Guest(p80=echo)) as ports:
        assert await answers(ports.publish(80))
    assert caplog.text.count("Too many open files") == 3


# Ports of the host ----------------------------------------------------------------------------


async def test_a_port_of_the_callers_choice() -> None:
    async with publishing(Guest(p80=echo)) as ports:
        free = ports.publish(80)
        await ports.unpublish(free)
        assert ports.published == ()
        chosen = ports.publish(80, free.host_port)
        assert chosen == free
        assert await answers(chosen)


async def test_a_port_that_is_taken() -> None:
    async with publishing(Guest(p80=echo)) as ports:
        port = ports.publish(80)
        with pytest.raises(Conflict, match=f"port {port.host_port} of 127.0.0.1 is in use; choose"):
            ports.publish(81, port.host_port)
        assert ports.published == (port,)
        assert await answers(port)


async def test_a_port_that_is_held_beforehand() -> None:
    async with publishing(Guest(p80=echo)) as ports:
        with HeldPort(80) as held:
            for _ in range(2):
                with pytest.raises(Conflict, match=f"port {held.port.host_port} .* is in use"):
                    ports.publish(81, held.port.host_port)
            async with client(held.port) as early:
                assert ports.publish(held) == held.port
                await asyncio.get_running_loop().sock_sendall(early, b"hello")
                early.shutdown(socket.SHUT_WR)
                assert await receive_all(early) == b"hello"
        assert await answers(held.port), "it is the guest's now"
        with HeldPort(80) as unused:
            pass
        again = ports.publish(80, unused.port.host_port)
        assert again == unused.port


@pytest.mark.parametrize(("guest_port", "host_port"), [(0, 0), (65536, 0), (80, -1), (80, 65536)])
async def test_ports_that_cannot_be(guest_port: int, host_port: int) -> None:
    async with publishing(Guest()) as ports:
        with pytest.raises(InvalidInput, match="use 1 to 65535"):
            ports.publish(guest_port, host_port)


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:80", "::1%none", "192.0.2.1", ""])
async def test_addresses_that_cannot_be(address: str) -> None:
    async with publishing(Guest()) as ports:
        with pytest.raises(InvalidInput, match="is no address"):
            ports.publish(80, 0, address)


async def test_another_address_of_the_host() -> None:
    async with publishing(Guest(p80=echo)) as ports:
        everywhere = ports.publish(80, 0, "0.0.0.0")
        assert everywhere.address == "0.0.0.0"
        for address in ("127.0.0.1", "127.0.0.2"):
            assert await answers(replace(everywhere, address=address))
        elsewhere = ports.publish(80, 0, "127.0.0.2")
        assert ports.published == (everywhere, elsewhere)
        assert await answers(elsewhere)
        with pytest.raises(Conflict, match=f"port {elsewhere.host_port} of 127.0.0.2 is in use"):
            ports.publish(80, elsewhere.host_port, "127.0.0.2")
        beside = ports.publish(80, elsewhere.host_port)
        await ports.unpublish(beside)
        assert await answers(elsewhere)


async def test_the_loopback_is_ipv6s_too() -> None:
    """`localhost` is ::1 first, for programs that do not try both."""
    async with publishing(Guest(p80=echo)) as ports:
        port = ports.publish(80)
        assert port.address == "127.0.0.1"
        assert await answers(replace(port, address="::1"))
        await ports.unpublish(port)
        with socket.create_server(("::1", port.host_port), family=socket.AF_INET6):
            assert ports.publish(80, port.host_port) == port, "it is not needed"
            assert await answers(port)
            with pytest.raises(Conflict, match=f"port {port.host_port} of ::1 is in use"):
                ports.publish(80, port.host_port, "::1")
        six = ports.publish(80, 0, "::")
        assert await answers(replace(six, address="::1"))
        with socket.socket() as four:
            four.bind(("127.0.0.1", six.host_port))


async def test_they_listen_on_the_loopback_alone() -> None:
    async with publishing(Guest(p80=echo)) as ports:
        port = ports.publish(80)
        with socket.socket() as other:  # so nobody has the port on all addresses
            other.bind(("127.0.0.2", port.host_port))


async def test_unpublished_is_closed_and_the_others_go_on() -> None:
    loop = asyncio.get_running_loop()
    guest = Guest(p80=echo)
    async with publishing(guest) as ports:
        one, two = ports.publish(80), ports.publish(80)
        async with client(one) as connection:
            await loop.sock_sendall(connection, b"hello")
            assert await loop.sock_recv(connection, 100) == b"hello"
            await ports.unpublish(one)
            await assert_reset(connection)
        with pytest.raises(ConnectionRefusedError):
            async with client(one):
                pass
        assert ports.published == (two,)
        assert await answers(two)
        with pytest.raises(NotFound, match=f"port {one.host_port} of 127.0.0.1 is not published"):
            await ports.unpublish(one)


async def test_closing_ends_all_at_any_moment() -> None:
    guest = Guest(p80=echo)
    async with publishing(guest) as ports:
        ports.publish(80)  # its listener has not begun to run
    async with publishing(guest) as ports, client(ports.publish(80)), client(ports.publish(80)):
        while guest.open < 2:
            await asyncio.sleep(0.01)
        await asyncio.gather(ports.close(), ports.close())
        assert guest.open == 0
