"""WebSockets into sandboxes: commands, terminals, code, changes of files, connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import websockets
from served_daemon import Served
from vm_helpers import FOR_EVER
from websockets.asyncio.client import ClientConnection

from ratoon.units import MIB

pytest_plugins = ["daemon_plugin"]


class Talk:
    """A WebSocket of the daemon's, as its clients use it."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    async def say(self, **fields: Any) -> None:
        await self._socket.send(json.dumps(fields))

    async def send(self, data: bytes) -> None:
        await self._socket.send(data)

    async def hear(self) -> bytes | dict[str, Any]:
        message = await asyncio.wait_for(self._socket.recv(), FOR_EVER)
        return message if isinstance(message, bytes) else json.loads(message)

    async def told(self) -> dict[str, Any]:
        """The next text; there must be no output before it."""
        message = await self.hear()
        assert isinstance(message, dict), message
        return message

    async def to_the_end(self) -> tuple[bytes, bytes, dict[str, Any]]:
        """All of stdout and stderr, and what is said in the end."""
        output = {1: bytearray(), 2: bytearray()}
        while isinstance(message := await self.hear(), bytes):
            output[message[0]] += message[1:]
        with pytest.raises(websockets.ConnectionClosedOK):
            await asyncio.wait_for(self._socket.recv(), FOR_EVER)
        return bytes(output[1]), bytes(output[2]), message


@asynccontextmanager
async def talk(served: Served, path: str) -> AsyncIterator[Talk]:
    url = f"ws://ratoon/v1/sandboxes/{path}"
    async with websockets.unix_connect(str(served.socket), url) as socket:
        yield Talk(socket)


@asynccontextmanager
async def running(served: Served, sandbox: str, *argv: str, **options: Any) -> AsyncIterator[Talk]:
    """A command that has been started."""
    async with talk(served, f"{sandbox}/exec/stream") as client:
        await client.say(argv=argv, **options)
        assert "pid" in (await client.told())["started"]
        yield client


async def test_a_command_from_input_to_exit(served: Served, shared_sandbox: str) -> None:
    script = "cat; echo error >&2; exit 5"
    async with running(served, shared_sandbox, "sh", "-c", script, stdin=True) as command:
        await command.send(b"\x00\xffone")
        await command.send(b"two")
        await command.say(eof=True)
        out, err, end = await command.to_the_end()
    assert (out, err) == (b"\x00\xffonetwo", b"error\n")
    assert end == {"exit": {"exit_code": 5, "timed_out": False, "reason": None}}


async def test_a_terminal_and_its_size(served: Served, shared_sandbox: str) -> None:
    script = "trap 'stty size; exit 0' WINCH; stty size; echo ready; while :; do sleep 0.1; done"
    size = {"rows": 11, "columns": 22}
    async with running(served, shared_sandbox, "sh", "-c", script, pty=size) as command:
        seen = b""
        while b"ready" not in seen:
            piece = await command.hear()
            assert isinstance(piece, bytes)
            seen += piece[1:]
        await command.say(resize={"rows": 33, "columns": 44})
        out, err, end = await command.to_the_end()
    assert b"11 22" in seen
    assert b"33 44" in out
    assert (err, end["exit"]["exit_code"]) == (b"", 0)


async def test_signals_timeouts_and_programs_that_are_not_there(
    served: Served, shared_sandbox: str
) -> None:
    async with running(served, shared_sandbox, "sleep", "1000") as command:
        await command.say(signal=15)
        assert (await command.to_the_end())[2]["exit"]["exit_code"] == 143
    async with running(served, shared_sandbox, "sleep", "1000", timeout=0.5) as command:
        end = (await command.to_the_end())[2]["exit"]
        assert (end["exit_code"], end["timed_out"]) == (124, True)
    async with running(served, shared_sandbox, "no-such-program") as command:
        end = (await command.to_the_end())[2]["exit"]
        assert end["exit_code"] == 127
        assert "no-such-program" in end["reason"]


async def test_a_command_in_the_background_is_listed_and_attached_to(
    served: Served, shared_sandbox: str
) -> None:
    api, path = served.api, f"/v1/sandboxes/{shared_sandbox}/processes"
    async with talk(served, f"{shared_sandbox}/exec/stream") as client:
        script = "echo begun; read line; echo $line"
        await client.say(argv=["sh", "-c", script], stdin=True, background=True)
        pid = (await client.told())["started"]["pid"]
    (process,) = (each for each in (await api.get(path)).json() if each["pid"] == pid)
    assert (process["argv"][0], process["background"], process["exit_code"]) == ("sh", True, None)
    async with talk(served, f"{shared_sandbox}/exec/stream") as client:
        await client.say(attach=pid)
        assert (await client.told()) == {"started": {"pid": pid}}
        await client.send(b"more\n")
        out, _, end = await client.to_the_end()
    assert (out, end["exit"]["exit_code"]) == (b"begun\nmore\n", 0)
    for number, status in ((15, 409), (65, 400)):
        answer = await api.post(f"{path}/{pid}/signal", json={"signal": number})
        assert answer.status_code == status
    assert (await api.post(f"{path}/999999/signal", json={"signal": 15})).status_code == 404
    async with talk(served, f"{shared_sandbox}/exec/stream") as client:
        await client.say(attach=999999)
        refused = await client.told()
        assert (refused["kind"], refused["status"]) == ("NotFound", 404)


async def test_code_in_the_interpreter(served: Served, shared_sandbox: str) -> None:
    async with talk(served, f"{shared_sandbox}/eval/stream") as client:
        await client.say(code="import sys\nprint('out')\nprint('err', file=sys.stderr)\n6 * 7")
        out, err, end = await client.to_the_end()
    assert (out, err) == (b"out\n", b"err\n")
    assert (end["exit"]["result"], end["exit"]["exit_code"]) == ("42", 0)


async def test_changes_of_files(served: Served, shared_sandbox: str) -> None:
    files = f"/v1/sandboxes/{shared_sandbox}/files"
    await served.api.post(f"{files}/mkdir?path=/root/watched")
    async with talk(served, f"{shared_sandbox}/files/watch?path=/root/watched") as client:
        assert await client.told() == {"started": {}}
        await served.api.post(f"{files}/mkdir?path=/root/watched/%FF")
        event = (await client.told())["event"]
    assert (event["kind"], event["path"]) == ("created", "/root/watched/\udcff")
    async with talk(served, f"{shared_sandbox}/files/watch?path=/absent") as client:
        assert (await client.told())["status"] == 404


async def test_connections(served: Served, shared_sandbox: str) -> None:
    code = (
        "import socket, threading\n"
        "s = socket.create_server(('127.0.0.1', 7000))\n"
        "def serve():\n"
        "    c, _ = s.accept()\n"
        "    data = b''\n"
        "    while piece := c.recv(65536): data += piece\n"
        "    c.sendall(data[::-1]); c.close()\n"
        "threading.Thread(target=serve, daemon=True).start()"
    )
    await served.api.post(f"/v1/sandboxes/{shared_sandbox}/eval", json={"code": code})
    async with talk(served, f"{shared_sandbox}/dial/7000") as client:
        assert await client.told() == {"started": {}}
        await client.send(b"abc" * 100_000)
        await client.say(eof=True)
        back = b""
        while isinstance(piece := await client.hear(), bytes):
            back += piece
    assert back == b"cba" * 100_000
    assert piece == {"eof": True}
    async with talk(served, f"{shared_sandbox}/dial/7001") as client:
        assert "refused" in (await client.told())["error"]


@pytest.mark.parametrize(
    ("opening", "status"),
    [
        (b"binary", 400),
        ("[1]", 400),
        ("{", 400),
        ('{"argv": []}', 400),
        ('{"argv": "true"}', 422),
        ('{"argv": ["a\\u0000b"]}', 400),
        ('{"argv": ["true"], "attach": 1}', 400),
        ('{"argv": ["true"], "pty": {"rows": 0, "columns": 1}}', 400),
        ('{"argv": ["true"], "timeout": -1}', 400),
        ('{"argv": ["true"], "user": "nobody-at-all"}', 400),
    ],
)
async def test_openings_that_are_refused(
    served: Served, shared_sandbox: str, opening: str | bytes, status: int
) -> None:
    url = f"ws://ratoon/v1/sandboxes/{shared_sandbox}/exec/stream"
    async with websockets.unix_connect(str(served.socket), url) as socket:
        await socket.send(opening)
        answer = json.loads(await asyncio.wait_for(socket.recv(), FOR_EVER))
    assert answer["status"] == status, answer
    assert answer["error"]


async def test_there_is_no_stream_into_what_is_not_there(served: Served) -> None:
    async with talk(served, "sb-0-0/exec/stream") as client:
        await client.say(argv=["true"])
        assert (await client.told())["status"] == 404
    with pytest.raises(websockets.InvalidStatus) as refused:
        async with talk(served, "sb-0-0/nonsense"):
            raise AssertionError
    assert refused.value.response.status_code in (403, 404)


async def test_nonsense_later_ends_the_stream_and_the_command(
    served: Served, shared_sandbox: str
) -> None:
    async with running(served, shared_sandbox, "sh", "-c", "echo $$; sleep 1000") as command:
        first = await command.hear()
        assert isinstance(first, bytes)
        await command.say(signal=0)
        assert (await command.told())["status"] == 400
    gone = f"while [ -e /proc/{int(first[1:])} ]; do sleep 0.1; done"
    body = {"args": ["sh", "-c", gone], "timeout_secs": FOR_EVER}
    done = await served.api.post(f"/v1/sandboxes/{shared_sandbox}/exec", json=body)
    assert done.json()["exit_code"] == 0


async def test_who_does_not_read_holds_up_nobody_else(served: Served, shared_sandbox: str) -> None:
    """A flood of output is held back in the guest, and does not pile up here."""
    flood = ("sh", "-c", "cat /dev/zero")
    async with (
        running(served, shared_sandbox, *flood),
        running(served, shared_sandbox, *flood),
        running(served, shared_sandbox, "cat", stdin=True) as other,
    ):
        for number in range(20):
            await other.send(b"%d" % number)
            assert await other.hear() == b"\x01%d" % number
        answer = await served.api.post(
            f"/v1/sandboxes/{shared_sandbox}/exec", json={"args": ["echo", "here"]}
        )
        assert answer.json()["stdout"] == "here\n"


async def test_who_vanishes_takes_the_command_along(served: Served, shared_sandbox: str) -> None:
    async with running(served, shared_sandbox, "sh", "-c", "echo $$; sleep 1000") as command:
        first = await command.hear()
        assert isinstance(first, bytes)
        command._socket.transport.abort()
    gone = f"while [ -e /proc/{int(first[1:])} ]; do sleep 0.1; done"
    body = {"args": ["sh", "-c", gone], "timeout_secs": FOR_EVER}
    done = await served.api.post(f"/v1/sandboxes/{shared_sandbox}/exec", json=body)
    assert done.json()["exit_code"] == 0


async def test_who_vanishes_while_input_waits_is_missed_too(
    served: Served, shared_sandbox: str
) -> None:
    """What nobody takes is not read any further, and the end of the connection lies behind it."""
    script = "echo $$; exec sleep 1000"
    async with running(served, shared_sandbox, "sh", "-c", script, stdin=True) as command:
        first = await command.hear()
        assert isinstance(first, bytes)

        async def flood() -> None:
            while True:
                await command.send(bytes(100_000))

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(flood(), 2)
        command._socket.transport.abort()
    gone = f"while [ -e /proc/{int(first[1:])} ]; do sleep 0.1; done"
    body = {"args": ["sh", "-c", gone], "timeout_secs": FOR_EVER}
    done = await served.api.post(f"/v1/sandboxes/{shared_sandbox}/exec", json=body)
    assert done.json()["exit_code"] == 0


async def test_megabytes_there_and_back(served: Served, shared_sandbox: str) -> None:
    data = bytes(range(256)) * (4 * MIB // 256)
    async with running(served, shared_sandbox, "cat", stdin=True) as command:

        async def feed() -> None:
            for start in range(0, len(data), 100_000):
                await command.send(data[start : start + 100_000])
            await command.say(eof=True)

        feeding = asyncio.create_task(feed())
        out, _, end = await command.to_the_end()
        await feeding
    assert end["exit"]["exit_code"] == 0
    assert out == data
