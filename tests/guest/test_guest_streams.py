"""Conversations on a channel: credit both ways, early ends, and guests that do not keep to it."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from channel_peer import Peer, connected, together

from ratoon.errors import GuestError
from ratoon.machine.guest.channel import REASON_LIMIT, Channel, GuestStream
from ratoon.machine.guest.shared import wire

WINDOW = wire.OUTPUT_WINDOW


@asynccontextmanager
async def conversing() -> AsyncIterator[tuple[GuestStream, Peer, int]]:
    async with connected() as (channel, peer), channel.open("talk") as stream:
        number, request = await peer.request()
        assert request == {"op": "talk"}
        yield stream, peer, number


async def read_exactly(stream: GuestStream, count: int) -> bytes:
    """That much of stdout, in as many pieces as it comes."""
    data = b""
    async with asyncio.timeout(10):
        while len(data) < count:
            piece = await stream.read()
            assert piece is not None
            assert piece[0] == wire.STDOUT
            data += piece[1]
    assert len(data) == count
    return data


async def flushed(channel: Channel, peer: Peer) -> None:
    """All that the peer has sent was received."""
    asking = asyncio.create_task(channel.request("hello", timeout=60))
    number, _ = await peer.request()
    peer.reply(number)
    await asking


# Output ---------------------------------------------------------------------------------------


async def test_output_then_the_reply() -> None:
    async with conversing() as (stream, peer, number):
        peer.send(number, wire.STDOUT, b"one")
        peer.send(number, wire.STDERR, b"two")
        assert await stream.read() == (wire.STDOUT, b"one")
        assert await stream.read() == (wire.STDERR, b"two")
        peer.reply(number, done=True)
        assert await stream.read() is None
        assert await stream.read() is None
        assert await stream.result() == {"done": True}
        await peer.silence()


async def test_the_result_does_not_wait_for_a_reader() -> None:
    async with conversing() as (stream, peer, number):
        result = asyncio.create_task(stream.result())
        for _ in range(8):
            for _ in range(8):
                peer.send(number, wire.STDOUT, bytes(WINDOW // 16))
            assert (await peer.receive())[:2] == (number, wire.OUTPUT_TAKEN)
        peer.reply(number, done=True)
        assert await result == {"done": True}


async def test_the_end_of_one_output_is_heard_before_the_reply() -> None:
    async with conversing() as (stream, peer, number):
        peer.send(number, wire.STDOUT, b"last")
        peer.send(number, wire.STDOUT, b"")
        assert await stream.read() == (wire.STDOUT, b"last")
        assert await stream.read() == (wire.STDOUT, b"")
        peer.send(number, wire.STDERR, b"more")
        assert await stream.read() == (wire.STDERR, b"more")


async def test_credit_comes_back_as_output_is_read() -> None:
    async with conversing() as (stream, peer, number):
        sent = given = 0
        for _ in range(50):
            size = min(60_000, WINDOW - (sent - given))
            peer.send(number, wire.STDOUT, bytes(size))
            sent += size
            assert await stream.read() == (wire.STDOUT, bytes(size))
            while sent - given > WINDOW // 2:
                stream_number, kind, payload = await peer.receive()
                assert (stream_number, kind) == (number, wire.OUTPUT_TAKEN)
                given += wire.CREDIT.unpack(payload)[0]
        assert sent > 4 * WINDOW
        assert given <= sent


async def test_what_is_not_read_gives_no_credit_and_holds_up_nobody() -> None:
    async with connected() as (channel, peer), channel.open("slow") as slow:
        number, _ = await peer.request()
        peer.send(number, wire.STDOUT, bytes(WINDOW))
        await flushed(channel, peer)
        await peer.silence()
        async with channel.open("quick") as quick:
            other, _ = await peer.request()
            for _ in range(20):
                peer.send(other, wire.STDOUT, bytes(WINDOW // 2))
                await read_exactly(quick, WINDOW // 2)
                assert (await peer.receive())[:2] == (other, wire.OUTPUT_TAKEN)
            peer.reply(other)
            assert await quick.result() == {}
        assert await read_exactly(slow, WINDOW) == bytes(WINDOW)


async def test_a_byte_at_a_time_takes_hardly_more_memory_than_its_credit() -> None:
    async with connected() as (channel, peer), channel.open("talk") as stream:
        number, _ = await peer.request()
        frames = wire.encode(number, wire.STDOUT, b"o") + wire.encode(number, wire.STDERR, b"e")
        count = WINDOW // 128
        await flushed(channel, peer)
        tracemalloc.start()
        try:
            peer.write(frames * count)
            await flushed(channel, peer)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 40 * count  # else some 300
        said = {wire.STDOUT: b"", wire.STDERR: b""}
        peer.reply(number)
        while (piece := await stream.read()) is not None:
            said[piece[0]] += piece[1]
        assert said == {wire.STDOUT: b"o" * count, wire.STDERR: b"e" * count}


# Starting and ending --------------------------------------------------------------------------


async def test_what_has_begun() -> None:
    async with conversing() as (stream, peer, number):
        peer.send(number, wire.STARTED, b'{"pid": 7}')
        peer.reply(number)
        assert await stream.started() == {"pid": 7}
        assert await stream.result() == {}


async def test_what_was_refused_did_not_begin() -> None:
    async with conversing() as (stream, peer, number):
        peer.reply(number, error="no\x1b[2Jway", kind="closed")
        for ask in (stream.started, stream.result):
            with pytest.raises(GuestError, match=r"refused talk: no\ufffd.2Jway") as caught:
                await ask()
            assert caught.value.kind == "closed"


async def test_a_long_explanation_is_cut() -> None:
    async with conversing() as (stream, peer, number):
        peer.reply(number, error="x" * 1_000_000, kind=["y" * 1_000_000])
        with pytest.raises(GuestError) as caught:
            await stream.result()
        assert len(str(caught.value)) < REASON_LIMIT + 100
        assert len(caught.value.kind) <= REASON_LIMIT


async def test_leaving_early_cancels() -> None:
    async with connected() as (channel, peer):
        async with channel.open("talk") as stream:
            number, _ = await peer.request()
        assert await peer.receive() == (number, wire.CANCEL, b"")
        for _ in range(5):  # the guest goes on for a while, with no credit any more
            peer.send(number, wire.STDOUT, bytes(WINDOW))
        peer.send(number, wire.STDOUT, b"")
        peer.reply(number, late=True)
        await flushed(channel, peer)
        for ask in (stream.read(), stream.write(b"more"), stream.result(), stream.started()):
            with pytest.raises(GuestError, match="conversation is over"):
                await ask
        with pytest.raises(GuestError, match="conversation is over"):
            stream.end_input()


async def test_leaving_after_the_reply_says_nothing_more() -> None:
    async with connected() as (channel, peer):
        async with channel.open("talk") as stream:
            number, _ = await peer.request()
            peer.reply(number, done=True)
            assert await stream.result() == {"done": True}
            stream.end_input()
            stream.resize(1, 1)
            await stream.write(b"too late")
        await peer.silence()


async def test_whoever_waits_may_be_cancelled() -> None:
    async with conversing() as (stream, peer, number):
        tasks = [
            asyncio.create_task(stream.read()),
            asyncio.create_task(stream.write(bytes(2 * wire.STDIN_WINDOW))),
        ]
        taken = 0
        while taken < wire.STDIN_WINDOW:
            taken += len((await peer.receive())[2])
        for task in tasks:
            task.cancel()
        errors = await together(*tasks)
        assert {type(error) for error in errors} == {asyncio.CancelledError}
        peer.send(number, wire.STDOUT, b"still there")
        assert await stream.read() == (wire.STDOUT, b"still there")


async def test_a_lost_channel_wakes_everybody_after_what_has_arrived() -> None:
    before = len(asyncio.all_tasks())
    async with connected() as (channel, peer), channel.open("talk") as stream:
        number, _ = await peer.request()
        peer.send(number, wire.STDOUT, b"arrived")
        writing = asyncio.create_task(stream.write(bytes(2 * wire.STDIN_WINDOW)))
        await flushed_stdin(peer)
        await peer.close()
        (error,) = await together(writing)
        assert isinstance(error, GuestError)
        assert await stream.read() == (wire.STDOUT, b"arrived")
        for ask in (stream.read(), stream.result()):
            with pytest.raises(GuestError, match="channel to the agent of sb-test is closed"):
                await ask
    assert len(asyncio.all_tasks()) == before


async def flushed_stdin(peer: Peer) -> None:
    taken = 0
    while taken < wire.STDIN_WINDOW:
        taken += len((await peer.receive())[2])


# Input ----------------------------------------------------------------------------------------


async def test_signals_and_sizes() -> None:
    async with conversing() as (stream, peer, number):
        stream.resize(24, 65535)
        stream.signal(15)
        stream.end_input()
        assert await peer.receive() == (number, wire.RESIZE, b"\x00\x18\xff\xff")
        assert await peer.receive() == (number, wire.SIGNAL, b"\x0f")
        assert await peer.receive() == (number, wire.STDIN_END, b"")


# Nonsense -------------------------------------------------------------------------------------

NONSENSE: dict[str, list[tuple[int, bytes]]] = {
    "more output than its credit": [(wire.STDOUT, bytes(WINDOW + 1))],
    "more of both than their credit": [(kind, bytes(WINDOW // 2 + 1)) for kind in wire.OUTPUTS],
    "output after its end": [(wire.STDOUT, b""), (wire.STDOUT, b"more")],
    "two ends": [(wire.STDERR, b"")] * 2,
    "begun twice": [(wire.STARTED, b"{}")] * 2,
    "a beginning that is no object": [(wire.STARTED, b"[]")],
    "a beginning that is no JSON": [(wire.STARTED, b"\xff")],
    "the host's kind": [(wire.OUTPUT_TAKEN, bytes(4))],
    "credit of another size": [(wire.STDIN_TAKEN, bytes(5))],
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=list(NONSENSE))
async def test_nonsense_closes_the_channel(nonsense: list[tuple[int, bytes]]) -> None:
    async with connected() as (channel, peer), channel.open("talk") as stream:
        number, _ = await peer.request()
        async with channel.open("other") as other:
            await peer.request()
            for kind, payload in nonsense:
                peer.send(number, kind, payload)
            await peer.closed()
            for broken in (stream, other):
                with pytest.raises(GuestError, match=r"sb-test sent nonsense \("):
                    await broken.result()
