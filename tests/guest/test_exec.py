"""Commands of the host, against a peer that does as it is told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from channel_peer import Peer, connected, together

from ratoon.errors import Conflict, GuestError, GuestTimeout, InvalidInput
from ratoon.machine.guest import commands
from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.commands import ExecResult
from ratoon.machine.guest.shared import wire
from ratoon.machine.guest.shared.wire import MARKER


@asynccontextmanager
async def running(
    channel: Channel, peer: Peer, **options: Any
) -> AsyncIterator[tuple[asyncio.Task[ExecResult], int]]:
    task = asyncio.create_task(commands.exec(channel, ["program"], **options))
    stream, request = await peer.request()
    assert (request["op"], request["argv"]) == ("exec", ["program"])
    yield task, stream
    if not task.done():
        task.cancel()
        await together(task)


async def test_a_command_and_how_it_ended() -> None:
    async with connected() as (channel, peer), running(channel, peer) as (task, stream):
        peer.send(stream, wire.STDOUT, b"out")
        peer.send(stream, wire.STDERR, b"err")
        peer.send(stream, wire.STDOUT, b"put")
        peer.reply(stream, exit_code=3)
        assert await task == ExecResult(3, b"output", b"err")


async def test_what_a_command_is_given() -> None:
    async with connected() as (channel, peer):
        options: dict[str, Any] = {"env": {"A": "b"}, "cwd": "/tmp", "timeout": 1.5}
        task = asyncio.create_task(commands.exec(channel, ["a", "b c"], **options))
        stream, request = await peer.request()
        assert request == {"op": "exec", "argv": ["a", "b c"], "stdin": False, **options}
        peer.reply(stream, exit_code=0)
        await task


@pytest.mark.parametrize(
    ("reply", "result"),
    [
        ({"exit_code": 0}, ExecResult(0, b"", b"")),
        ({"exit_code": 124, "timed_out": True}, ExecResult(124, b"", b"", timed_out=True)),
        ({"exit_code": 1, "timed_out": "yes"}, ExecResult(1, b"", b"")),
        ({"exit_code": 127, "reason": "gone"}, ExecResult(127, b"", b"", error="gone")),
        ({"exit_code": 127, "reason": {"a": 1}}, ExecResult(127, b"", b"", error="{'a': 1}")),
        ({"exit_code": 255, "else": [1]}, ExecResult(255, b"", b"")),
    ],
)
async def test_the_reply_of_a_command(reply: dict[str, Any], result: ExecResult) -> None:
    async with connected() as (channel, peer), running(channel, peer) as (task, stream):
        peer.reply(stream, **reply)
        assert await task == result


@pytest.mark.parametrize(
    "reply",
    [
        {},
        *({"exit_code": code} for code in ("0", None, 1.5, True, 256, -1)),
    ],
)
async def test_a_reply_without_an_exit_code_is_a_refusal(reply: dict[str, Any]) -> None:
    async with connected() as (channel, peer), running(channel, peer) as (task, stream):
        peer.reply(stream, **reply)
        with pytest.raises(GuestError, match="sb-test gave no exit code"):
            await task


async def test_a_command_that_is_refused() -> None:
    async with connected() as (channel, peer), running(channel, peer) as (task, stream):
        peer.reply(stream, error="OSError: no", exit_code=0)
        with pytest.raises(GuestError, match="sb-test refused exec: OSError: no"):
            await task


@pytest.mark.parametrize("pieces", [[10], [9, 2], [4, 4, 4], [100, 100]])
async def test_too_much_output_is_cut(pieces: list[int]) -> None:
    async with (
        connected() as (channel, peer),
        running(channel, peer, output_limit=10) as (
            task,
            stream,
        ),
    ):
        for piece in pieces:
            peer.send(stream, wire.STDOUT, b"o" * piece)
            peer.send(stream, wire.STDERR, b"e")
        peer.reply(stream, exit_code=0)
        result = await task
        assert result.stdout == b"o" * 10
        assert result.stderr == b"e" * len(pieces)
        assert result.truncated == (sum(pieces) > 10)


async def test_a_cancelled_command_is_cancelled_in_the_guest() -> None:
    async with connected() as (channel, peer):
        for stdin in (b"", b"x" * 1_000_000):
            async with running(channel, peer, stdin=stdin) as (task, stream):
                task.cancel()
                assert isinstance((await together(task))[0], asyncio.CancelledError)
                kind = wire.STDIN
                while kind == wire.STDIN:
                    number, kind, _ = await peer.receive()
                assert (number, kind) == (stream, wire.CANCEL)
                peer.send(stream, wire.STDOUT, b"late")
                peer.reply(stream, exit_code=137)
        asking = asyncio.create_task(channel.request("hello", timeout=5))
        stream, _ = await peer.request()
        peer.reply(stream, version=1)
        assert await asking == {"version": 1}


# Standard input -------------------------------------------------------------------------------


async def take_stdin(peer: Peer, stream: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        number, kind, payload = await peer.receive()
        assert (number, kind) == (stream, wire.STDIN)
        data += payload
    return data


async def test_stdin_and_its_end() -> None:
    async with connected() as (channel, peer):
        data = random.Random(2).randbytes(100_000) + MARKER
        async with running(channel, peer, stdin=data) as (task, stream):
            assert await take_stdin(peer, stream, len(data)) == data
            assert await peer.receive() == (stream, wire.STDIN_END, b"")
            peer.reply(stream, exit_code=0)
            await task


async def test_no_more_than_the_window_is_under_way() -> None:
    async with connected() as (channel, peer):
        data = random.Random(2).randbytes(2 * wire.STDIN_WINDOW)
        async with running(channel, peer, stdin=data) as (task, stream):
            got = await take_stdin(peer, stream, wire.STDIN_WINDOW)
            await peer.silence()
            peer.send(stream, wire.STDIN_TAKEN, (1).to_bytes(4, "big"))
            got += await take_stdin(peer, stream, 1)
            await peer.silence()
            assert got == data[: wire.STDIN_WINDOW + 1]
            peer.reply(stream, exit_code=1)  # without having read the rest
            assert (await task).exit_code == 1


async def test_a_window_larger_than_it_can_be_is_not_believed() -> None:
    async with connected() as (channel, peer):
        data = bytes(4 * wire.STDIN_WINDOW)
        async with running(channel, peer, stdin=data) as (task, stream):
            for _ in range(3):
                peer.send(stream, wire.STDIN_TAKEN, (2**32 - 1).to_bytes(4, "big"))
            await take_stdin(peer, stream, wire.STDIN_WINDOW)
            peer.reply(stream, exit_code=0)
            await task


async def test_window_for_a_command_without_stdin() -> None:
    async with connected() as (channel, peer), running(channel, peer) as (task, stream):
        peer.send(stream, wire.STDIN_TAKEN, bytes(4))
        peer.reply(stream, exit_code=0)
        assert (await task).exit_code == 0
        await peer.silence()


# No answer ------------------------------------------------------------------------------------


async def test_an_agent_that_does_not_report_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "TIMEOUT_GRACE", 0.1)
    expected = r"sb-test did not report the end of program within 0.2 s, although its time is 0.1 s"
    async with (
        connected() as (channel, peer),
        running(channel, peer, timeout=0.1) as (task, stream),
    ):
        peer.send(stream, wire.STDOUT, b"still busy")
        with pytest.raises(GuestTimeout, match=expected):
            await task
        assert await peer.receive() == (stream, wire.CANCEL, b"")


async def test_an_agent_that_does_not_report_the_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commands, "TIMEOUT", 0.1)
    async with connected() as (channel, peer):
        starting = asyncio.create_task(start(channel))
        stream, _ = await peer.request()
        with pytest.raises(GuestTimeout, match=r"sb-test did not report program within 0.1 s"):
            await starting
        assert await peer.receive() == (stream, wire.CANCEL, b"")


async def test_an_end_that_is_reported_late_all_the_same() -> None:
    async with (
        connected() as (channel, peer),
        running(channel, peer, timeout=0.05) as (task, stream),
    ):
        await peer.silence(0.2)
        peer.reply(stream, exit_code=124, timed_out=True)
        assert await task == ExecResult(124, b"", b"", timed_out=True)


@pytest.mark.parametrize(
    ("kind", "error"), [("no-user", InvalidInput), ("taken", Conflict), ("", GuestError)]
)
async def test_what_a_refusal_is_to_the_caller(kind: str, error: type[Exception]) -> None:
    async with connected() as (channel, peer), running(channel, peer) as (task, stream):
        peer.reply(stream, error="it cannot be", kind=kind)
        with pytest.raises(error, match="sb-test refused exec: it cannot be") as caught:
            await task
        assert type(caught.value) is error


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"processes": None},
        {"processes": 7},
        {"processes": [{}]},
        {"processes": ["x"]},
        {"processes": [{"pid": "a"}]},
    ],
    ids=repr,
)
async def test_a_list_of_processes_that_is_none(reply: dict[str, Any]) -> None:
    async with connected() as (channel, peer):
        asking = asyncio.create_task(commands.processes(channel))
        stream, _ = await peer.request()
        peer.reply(stream, **reply)
        with pytest.raises(GuestError, match="gave no list of processes"):
            await asking


@pytest.mark.parametrize("begun", [b"{}", b'{"pid": "7"}', b'{"pid": true}'])
async def test_a_process_without_a_number(begun: bytes) -> None:
    async with connected() as (channel, peer):
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(start(channel))
            stream, _ = await peer.request()
            peer.send(stream, wire.STARTED, begun)
        assert starting.result() is None


async def start(channel: Channel) -> int | None:
    async with commands.start(channel, ["program"]) as command:
        return command.pid
