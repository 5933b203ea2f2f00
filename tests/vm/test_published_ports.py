"""Published ports on real machines: HTTP that is served in a guest and asked for on the host."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack

import pytest
from vm_helpers import FOR_EVER, sh

from ratoon.api.answers import PublishedPort
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest import commands
from ratoon.machine.guest.shared import wire

#: HTTP for /name and /content; of what is posted it says how much it was.
SERVER = """
import socket
with socket.create_server(("127.0.0.1", 8000)) as server:
    open("/srv/ready", "w").close()
    while True:
        connection, _ = server.accept()
        with connection:
            request = bytearray()
            while data := connection.recv(65536):
                request += data
            method, path, _ = request.split(None, 2)
            if method == b"GET":
                with open(b"/srv" + path, "rb") as file:
                    body = file.read()
            else:
                body = str(len(request.partition(b"\\r\\n\\r\\n")[2])).encode()
            connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\n" + body)
"""
SERVE = """
cat >/srv/server; hostname >/srv/name
setsid python3 /srv/server >/dev/null 2>&1 &
until [ -e /srv/ready ]; do sleep 0.1; done
"""


async def serve(sandbox: Sandbox) -> PublishedPort:
    await sh(sandbox, SERVE, stdin=SERVER.encode())
    return sandbox.publish(8000)


async def fetch(port: PublishedPort, path: str) -> bytes:
    """The body of what a guest serves under `path`."""
    return await ask(port, f"GET /{path} HTTP/1.0\r\n\r\n".encode())


async def ask(port: PublishedPort, request: bytes) -> bytes:
    head, _, body = (await converse(port, request)).partition(b"\r\n\r\n")
    assert head == b"HTTP/1.0 200 OK"
    return body


async def converse(port: PublishedPort, said: bytes) -> bytes:
    """Say this, and nothing more, and hear all of the answer."""
    async with asyncio.timeout(FOR_EVER):
        reader, writer = await asyncio.open_connection("127.0.0.1", port.host_port)
        try:
            writer.write(said)
            await writer.drain()
            writer.write_eof()
            return await reader.read()
        finally:
            writer.close()


async def test_a_server_that_knows_ipv6_alone(sandbox: Sandbox) -> None:
    server = SERVER.replace('("127.0.0.1", 8000)', '("::1", 8006), family=socket.AF_INET6')
    script = SERVE.replace("ready", "ready-6").replace("/srv/server", "/srv/server-6")
    await sh(sandbox, script, stdin=server.replace("ready", "ready-6").encode())
    assert await fetch(sandbox.publish(8006), "name") == f"{sandbox.id}\n".encode()


async def is_refused(sandbox: Sandbox) -> bool:
    """Whether the connection to a port where nobody listens is reset."""
    try:
        await converse(sandbox.publish(9), b"hello")
    except ConnectionResetError:
        return True
    return False


async def test_a_server_in_a_guest_serves_the_host_and_so_do_its_forks(engine: Engine) -> None:
    async with await engine.fork_one("base") as source:
        port = await serve(source)
        name = f"{source.id}\n".encode()
        assert await fetch(port, "name") == name
        assert await is_refused(source)
        await engine.branch(source, "serving")
        assert await fetch(port, "name") == name, "the source serves on"
        async with await engine.fork_one("serving") as fork:
            assert fork.ports == ()
            published = fork.publish(8000)
            assert published.host_port != port.host_port
            assert await fetch(published, "name") == name
            await sh(fork, "hostname >/srv/name")
            await engine.branch(fork, "serving-again")
            async with await engine.fork_one("serving-again") as fork_of_fork:
                found = await fetch(fork_of_fork.publish(8000), "name")
                assert found == f"{fork.id}\n".encode()
        assert await fetch(port, "name") == name


async def test_much_goes_either_way_beside_much_else(sandbox: Sandbox) -> None:
    content = os.urandom(4_000_000)
    await sandbox.files.write("/srv/content", content)
    port = await serve(sandbox)
    post = b"POST / HTTP/1.0\r\n\r\n" + content
    answers = await asyncio.gather(
        *(fetch(port, "content") for _ in range(3)),
        *(ask(port, post) for _ in range(3)),
        sh(sandbox, "echo quick"),
    )
    assert answers == [*[content] * 3, *[b"4000000"] * 3, "quick\n"]
    await sandbox.unpublish(port)


#: Answers each line that it is sent, for as long as more may come.
PATIENT = """
import asyncio, sys
async def serve(reader, writer):
    while line := await reader.readline():
        writer.write(line.upper())
        await writer.drain()
    writer.close()
async def main():
    async with await asyncio.start_server(serve, "127.0.0.1", 8001, backlog=8):
        print("ready", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_hundreds_of_clients_that_stay(sandbox: Sandbox) -> None:
    await sh(sandbox, "cat >/srv/patient", stdin=PATIENT.encode())
    async with commands.start(sandbox, ["python3", "/srv/patient"]) as server:
        assert await server.read() == (wire.STDOUT, b"ready\n")
        port = sandbox.publish(8001)
        async with asyncio.timeout(FOR_EVER), AsyncExitStack() as closing:

            async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                both = await asyncio.open_connection("127.0.0.1", port.host_port)
                closing.callback(both[1].close)
                return both

            async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
                writer.write(b"hello\n")
                return await reader.readline()

            clients = await asyncio.gather(*(connect() for _ in range(300)))
            for _ in range(3):
                answers = await asyncio.gather(*(ask(*client) for client in clients))
                assert answers == [b"HELLO\n"] * 300
            assert await sh(sandbox, "echo quick") == "quick\n"
        await sandbox.unpublish(port)


async def test_ports_end_with_their_sandbox(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        port = await serve(sandbox)
        assert await fetch(port, "name")
        reader, writer = await asyncio.open_connection("127.0.0.1", port.host_port)
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), FOR_EVER)
    writer.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port.host_port)
