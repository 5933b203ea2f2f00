"""Evaluations as the host asks for them, against a peer that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from channel_peer import Peer, connected, together

from ratoon.errors import GuestError, GuestTimeout, NoPython
from ratoon.machine.guest import evaluation
from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.evaluation import EvalResult, evaluate
from ratoon.machine.guest.shared import wire


@asynccontextmanager
async def evaluating(
    channel: Channel, peer: Peer, **options: Any
) -> AsyncIterator[tuple[asyncio.Task[EvalResult], int]]:
    task = asyncio.create_task(evaluate(channel, "1 + 1", **options))
    stream, request = await peer.request()
    assert request == {"op": "eval", "code": "1 + 1", "timeout": options.get("timeout")}
    yield task, stream
    if not task.done():
        task.cancel()
        await together(task)


async def test_a_result_and_its_output() -> None:
    async with connected() as (channel, peer), evaluating(channel, peer) as (task, stream):
        peer.send(stream, wire.STDOUT, b"out")
        peer.send(stream, wire.STDERR, b"err")
        peer.send(stream, wire.STDOUT, b"put")
        peer.reply(stream, result="2", reason=None, exit_code=0)
        assert await task == EvalResult("2", None, 0, b"output", b"err")


@pytest.mark.parametrize(
    ("reply", "result"),
    [
        ({"exit_code": 1, "reason": "no"}, EvalResult(None, "no", 1, b"", b"")),
        ({"exit_code": 0, "result": "a\ud800"}, EvalResult("a?", None, 0, b"", b"")),
        ({"exit_code": 0, "result": 5, "reason": []}, EvalResult(None, None, 0, b"", b"")),
        (
            {"exit_code": 124, "timed_out": True, "state_lost": True, "truncated": True},
            EvalResult(None, None, 124, b"", b"", True, True, True),
        ),
        ({"exit_code": 1, "timed_out": 1, "state_lost": "x"}, EvalResult(None, None, 1, b"", b"")),
    ],
)
async def test_the_reply(reply: dict[str, Any], result: EvalResult) -> None:
    async with connected() as (channel, peer), evaluating(channel, peer) as (task, stream):
        peer.reply(stream, **reply)
        assert await task == result


@pytest.mark.parametrize("code", [None, "0", True, 256, -1])
async def test_a_reply_without_an_exit_code(code: object) -> None:
    async with connected() as (channel, peer), evaluating(channel, peer) as (task, stream):
        peer.reply(stream, result="2", exit_code=code)
        with pytest.raises(GuestError, match="sb-test gave no exit code"):
            await task


async def test_too_much_output_is_cut() -> None:
    async with (
        connected() as (channel, peer),
        evaluating(channel, peer, output_limit=10) as (task, stream),
    ):
        peer.send(stream, wire.STDOUT, b"o" * 11)
        peer.reply(stream, exit_code=0)
        assert await task == EvalResult(None, None, 0, b"o" * 10, b"", truncated=True)


async def test_output_as_it_comes_and_no_faster_than_it_is_taken() -> None:
    heard: list[bytes] = []
    go = asyncio.Event()

    async def listen(data: bytes) -> None:
        heard.append(data)
        await go.wait()

    async with (
        connected() as (channel, peer),
        evaluating(channel, peer, on_stdout=listen) as (task, stream),
    ):
        peer.send(stream, wire.STDOUT, b"1")
        async with asyncio.timeout(10):
            while not heard:
                await asyncio.sleep(0.001)
        peer.send(stream, wire.STDOUT, bytes(wire.OUTPUT_WINDOW - 1))
        await peer.silence()  # no credit: it is still busy with the first byte
        assert heard == [b"1"]
        go.set()
        number, kind, _ = await peer.receive()
        assert (number, kind) == (stream, wire.OUTPUT_TAKEN)
        peer.send(stream, wire.STDERR, b"kept")
        peer.reply(stream, exit_code=0)
        assert await task == EvalResult(None, None, 0, b"", b"kept")
        assert len(b"".join(heard)) == wire.OUTPUT_WINDOW


async def test_a_listener_that_fails_ends_the_evaluation() -> None:
    async def fail(data: bytes) -> None:
        raise TimeoutError("of its own")

    async with (
        connected() as (channel, peer),
        evaluating(channel, peer, on_stderr=fail) as (task, stream),
    ):
        peer.send(stream, wire.STDERR, b"x")
        with pytest.raises(TimeoutError, match="of its own"):
            await task
        assert await peer.receive() == (stream, wire.CANCEL, b"")


async def test_a_cancelled_evaluation_is_cancelled_in_the_guest() -> None:
    async with connected() as (channel, peer), evaluating(channel, peer) as (task, stream):
        task.cancel()
        assert isinstance((await together(task))[0], asyncio.CancelledError)
        assert await peer.receive() == (stream, wire.CANCEL, b"")


async def test_an_agent_that_does_not_report_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "TIMEOUT_GRACE", 0.05)
    async with (
        connected() as (channel, peer),
        evaluating(channel, peer, timeout=0.05) as (task, _),
    ):
        with pytest.raises(GuestTimeout, match=r"within 0.1 s, although its time is 0.05 s"):
            await task


async def test_a_guest_without_python() -> None:
    async with connected() as (channel, peer), evaluating(channel, peer) as (task, stream):
        peer.reply(stream, error="the sandbox has no Python: …", kind="no-python")
        with pytest.raises(NoPython, match="sb-test refused eval: the sandbox has no Python"):
            await task
