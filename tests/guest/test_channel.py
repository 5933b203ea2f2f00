"""The host's end of the agent's port, against a peer that does as it is told."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from channel_peer import connected, together
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratoon.errors import GuestError, GuestTimeout
from ratoon.machine.guest import commands
from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.commands import ExecResult
from ratoon.machine.guest.shared import wire
from ratoon.machine.guest.shared.wire import MARKER, NONCE_BYTES

pytestmark = pytest.mark.usefixtures("swept")


@pytest.fixture(autouse=True)
async def nothing_unhandled() -> AsyncIterator[None]:
    """No error ends up in the loop's handler: of a callback, or one that nobody asked for."""
    loop = asyncio.get_running_loop()
    unhandled: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: unhandled.append(context))
    yield
    gc.collect()
    await asyncio.sleep(0)
    loop.set_exception_handler(None)
    assert unhandled == []


# Questions and answers ------------------------------------------------------------------------


async def test_a_question_and_its_answer() -> None:
    async with connected() as (channel, peer):
        asking = asyncio.create_task(channel.request("hello", timeout=5, number=7))
        stream, request = await peer.request()
        assert request == {"op": "hello", "number": 7}
        peer.reply(stream, version=1)
        assert await asking == {"version": 1}


async def test_answers_in_any_order() -> None:
    async with connected() as (channel, peer):
        asking = [asyncio.create_task(channel.request(f"op{i}", timeout=5)) for i in range(20)]
        requests = [await peer.request() for _ in asking]
        random.Random(4).shuffle(requests)
        for stream, request in requests:
            peer.reply(stream, was=request["op"])
        assert await together(*asking) == [{"was": f"op{i}"} for i in range(20)]


async def test_large_messages_both_ways() -> None:
    async with connected() as (channel, peer):
        text = "ü" * 400_000
        asking = asyncio.create_task(channel.request("echo", timeout=5, text=text))
        stream, request = await peer.request()
        peer.reply(stream, text=request["text"])
        assert await asking == {"text": text}


async def test_a_request_that_is_too_large_is_not_sent() -> None:
    async with connected() as (channel, peer):
        with pytest.raises(GuestError, match="more than the agent takes"):
            await channel.request("echo", timeout=5, text="x" * wire.MAX_MESSAGE)
        await peer.silence()


async def test_a_refusal() -> None:
    async with connected() as (channel, peer):
        asking = asyncio.create_task(channel.request("freeze", timeout=5))
        stream, _ = await peer.request()
        peer.reply(stream, error="KeyError: 'seconds'")
        with pytest.raises(GuestError, match="sb-test refused freeze: KeyError: 'seconds'"):
            await asking


async def test_no_answer_in_time() -> None:
    async with connected() as (channel, peer):
        with pytest.raises(GuestTimeout, match=r"sb-test did not answer hello within 0.05 s"):
            await channel.request("hello", timeout=0.05)
        stream, _ = await peer.request()
        assert await peer.receive() == (stream, wire.CANCEL, b"")
        peer.reply(stream, version=1)  # too late: nobody asks any more
        asking = asyncio.create_task(channel.request("hello", timeout=5))
        stream, _ = await peer.request()
        peer.reply(stream, version=2)
        assert await asking == {"version": 2}


async def test_rebirth_brings_randomness_time_and_a_name() -> None:
    async with connected() as (channel, peer):
        seen = []
        for expected in (wire.FORK, wire.RESUME, wire.PRACTICE):
            rebirth = channel.rebirth("sb-ü", "5" * 32, expected, timeout=5)
            asking = asyncio.create_task(rebirth)
            stream, kind, payload = await peer.receive()
            assert kind == wire.REBIRTH
            what, unix_ns, machine_id, entropy = wire.REBIRTH_FIELDS.unpack_from(payload)
            assert (what, machine_id) == (expected, b"5" * 32)
            assert 1.6e18 < unix_ns < 4e18
            assert payload[wire.REBIRTH_FIELDS.size :].decode() == "sb-ü"
            seen.append(entropy)
            peer.reply(stream)
            await asking
        assert len(set(seen)) == 3


# A session ------------------------------------------------------------------------------------

STALE = [
    b"",
    b"half a frame",
    wire.encode(1, wire.REPLY, b'{"stale": 1}'),
    MARKER + b"s" * NONCE_BYTES + wire.encode(1, wire.REPLY, b'{"stale": 1}'),
    MARKER + b"cut off",
    MARKER,
    MARKER[:5],
    wire.HEADER.pack(60_000, 1, wire.STDOUT),
    bytes(300_000),
]


@pytest.mark.parametrize("stale", STALE, ids=range(len(STALE)))
@pytest.mark.parametrize("at_once", [True, False])
async def test_what_comes_before_the_answer_is_dropped(stale: bytes, at_once: bool) -> None:
    async with connected() as (channel, peer):
        channel.begin()
        asking = asyncio.create_task(channel.request("hello", timeout=5))
        nonce = await peer.greeting()
        answer = stale + MARKER + nonce
        if at_once:
            peer.write(answer)
        else:
            for start in range(max(0, len(answer) - 60), len(answer)):
                peer.write(answer[start : start + 1])
                await asyncio.sleep(0)
        stream, _ = await peer.request()
        peer.reply(stream, version=3)
        assert await asking == {"version": 3}


@pytest.mark.parametrize("stale", [*STALE, wire.encode(156, wire.STDIN_TAKEN, bytes(4))])
async def test_what_comes_before_anything_was_asked_is_dropped(stale: bytes) -> None:
    """A fork whose streams were open at the branch speaks as soon as it runs."""
    async with connected() as (channel, peer):
        channel.data_received(stale)
        channel.begin()
        asking = asyncio.create_task(channel.request("hello", timeout=5))
        peer.write(MARKER + await peer.greeting())
        stream, _ = await peer.request()
        peer.reply(stream, version=3)
        assert await asking == {"version": 3}


async def test_without_the_answer_nothing_is_heard() -> None:
    async with connected() as (channel, peer):
        channel.begin()
        asking = asyncio.create_task(channel.request("hello", timeout=0.2))
        await peer.greeting()
        stream, _ = await peer.request()
        peer.reply(stream, version=1)
        peer.write(MARKER + bytes(NONCE_BYTES))
        peer.reply(stream, version=1)
        with pytest.raises(GuestTimeout):
            await asking


async def test_every_session_has_a_nonce_of_its_own() -> None:
    nonces = set()
    for _ in range(5):
        async with connected() as (channel, peer):
            channel.begin()
            asking = asyncio.create_task(channel.request("hello", timeout=0.01))
            nonces.add(await peer.greeting())
            await together(asking)
    assert len(nonces) == 5


# The end of the connection --------------------------------------------------------------------


async def test_a_lost_connection_fails_all_at_once() -> None:
    async with connected() as (channel, peer):
        asking = [asyncio.create_task(channel.request("hello", timeout=60)) for _ in range(5)]
        running = asyncio.create_task(commands.exec(channel, ["cat"], stdin=b"x" * (1 << 20)))
        await peer.request()
        await peer.close()
        errors = await together(*asking, running)
        assert {str(error) for error in errors} == {"the channel to the agent of sb-test is closed"}
        assert {type(error) for error in errors} == {GuestError}
        for later in (channel.request("hello", timeout=60), commands.exec(channel, ["true"])):
            with pytest.raises(GuestError, match="is closed"):
                await later


async def test_closing_fails_what_is_under_way_and_may_be_repeated() -> None:
    async with connected() as (channel, peer):
        asking = asyncio.create_task(channel.request("hello", timeout=60))
        await peer.request()
        channel.close()
        channel.close()
        (error,) = await together(asking)
        assert isinstance(error, GuestError)
        with pytest.raises(GuestError, match="is closed"):
            await channel.request("hello", timeout=60)


async def test_a_closed_channel_can_be_asked_at_once() -> None:
    async with connected() as (channel, _):
        channel.close()
        asking = [channel.request("hello", timeout=60) for _ in range(10)]
        assert {type(error) for error in await together(*asking)} == {GuestError}


async def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="cannot reach the agent of sb-test"):
        await Channel.connect(tmp_path / "agent", "sb-test")


# Nonsense -------------------------------------------------------------------------------------


def frame(stream: int, kind: int, payload: bytes = b"") -> bytes:
    return wire.HEADER.pack(len(payload), stream, kind) + payload


NONSENSE: dict[str, Callable[[int], bytes]] = {
    "not JSON": lambda stream: frame(stream, wire.REPLY, b"{"),
    "not UTF-8": lambda stream: frame(stream, wire.REPLY, b'{"a": "\xff"}'),
    "an empty reply": lambda stream: frame(stream, wire.REPLY),
    "a list": lambda stream: frame(stream, wire.REPLY, b"[]"),
    "a number": lambda stream: frame(stream, wire.REPLY, b"7"),
    "deep nesting": lambda stream: wire.encode(stream, wire.REPLY, b"[" * 3_000_000),
    "a huge number": lambda stream: wire.encode(stream, wire.REPLY, b'{"a": %s}' % (b"9" * 10_000)),
    "a huge length": lambda stream: wire.HEADER.pack(2**32 - 1, stream, wire.REPLY),
    "a length above the limit": lambda stream: wire.HEADER.pack(
        wire.MAX_PAYLOAD + 1, stream, wire.REPLY
    ),
    "an unknown kind": lambda stream: frame(stream, 99),
    "the host's own kind": lambda stream: frame(stream, wire.REQUEST, b"{}"),
    "output nobody asked for": lambda stream: frame(stream, wire.STDOUT, b"hi"),
    "a window of another size": lambda stream: frame(stream, wire.STDIN_TAKEN, b"123"),
    "a message without an end": lambda stream: (
        frame(stream, wire.PART, bytes(wire.MAX_PAYLOAD)) * 65
    ),
    "a message of many streams": lambda stream: frame(1, wire.PART, b"x") + frame(2, wire.PART),
    "a stream that never was": lambda stream: frame(stream + 9, wire.STDOUT, b"hi"),
    "stream zero": lambda stream: frame(0, wire.STDOUT, b"hi"),
    "a greeting in between": lambda stream: MARKER + bytes(NONCE_BYTES),
    "zeros": lambda stream: bytes(100),
}


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=list(NONSENSE))
async def test_nonsense_closes_the_channel(nonsense: Callable[[int], bytes]) -> None:
    async with connected() as (channel, peer):
        asking = asyncio.create_task(channel.request("hello", timeout=60))
        other = asyncio.create_task(channel.request("other", timeout=60))
        stream, _ = await peer.request()
        await peer.request()
        peer.write(nonsense(stream))
        errors = await together(asking, other)
        assert {type(error) for error in errors} == {GuestError}
        assert str(errors[0]).startswith("the agent of sb-test sent nonsense (")
        await peer.closed()
        with pytest.raises(GuestError, match="nonsense"):
            await channel.request("hello", timeout=60)


async def test_frames_of_streams_that_have_ended_are_ignored() -> None:
    async with connected() as (channel, peer):
        asking = asyncio.create_task(channel.request("hello", timeout=5))
        stream, _ = await peer.request()
        peer.reply(stream, version=1)
        for kind in (wire.REPLY, wire.STDOUT, wire.STDIN_TAKEN, wire.STDIN_END):
            peer.send(stream, kind, b"\xff")
        assert await asking == {"version": 1}
        asking = asyncio.create_task(channel.request("hello", timeout=5))
        stream, _ = await peer.request()
        peer.reply(stream, version=2)
        assert await asking == {"version": 2}


pieces = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.just(MARKER),
        st.builds(
            frame,
            st.integers(0, 4),
            st.sampled_from(sorted(wire.KINDS)),
            st.one_of(st.binary(max_size=8), st.just(b"{}"), st.just(b'{"exit_code": 0}')),
        ),
    ),
    max_size=6,
)


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pieces, st.booleans())
def test_whatever_comes_is_an_answer_or_a_guest_error(pieces: list[bytes], session: bool) -> None:
    async def converse() -> list[Any]:
        async with connected() as (channel, peer):
            if session:
                channel.begin()
            asking = asyncio.create_task(channel.request("hello", timeout=5))
            running = asyncio.create_task(commands.exec(channel, ["cat"], stdin=b"x" * 300_000))
            if session:
                peer.write(MARKER + await peer.greeting())
            await peer.receive()
            for piece in pieces:
                peer.write(piece)
                await asyncio.sleep(0)
            await peer.close()
            return await together(asking, running)

    unhandled: list[dict[str, Any]] = []
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        outcomes = runner.run(converse())
        gc.collect()
    assert all(isinstance(outcome, dict | ExecResult | GuestError) for outcome in outcomes)
    assert unhandled == []
