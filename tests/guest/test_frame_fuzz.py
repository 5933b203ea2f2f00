"""Frames that nobody would send: neither end breaks, and streams are not mixed up."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from typing import Any

import pytest
from agent_on_host import AgentOnHost, agent_on_host, wait_for
from channel_peer import connected, together
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ratoon.errors import GuestError
from ratoon.machine.guest.channel import Channel, GuestStream
from ratoon.machine.guest.shared import wire
from ratoon.units import MIB

pytestmark = pytest.mark.usefixtures("swept")

#: Of the stream that is to hear exactly this, and nothing else: as a header it would be none.
HONEST = b"\xbb" * 10_000


def frame(stream: int, kind: int, payload: bytes) -> bytes:
    return wire.HEADER.pack(len(payload), stream, kind) + payload


def mutated(data: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    out = bytearray(data)
    for place, value in changes:
        out[place % len(out)] = value
    return bytes(out[: max(1, len(out) - cut)])


kinds = st.sampled_from(sorted(wire.KINDS))
payloads = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"{}", b'{"pid": 1}', b'{"error": 1, "kind": 2}', b"\x00\x00\x00\x01", b"[]"]),
    st.integers(0, wire.MAX_PAYLOAD).map(bytes),
)


def frames_of(streams: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return st.builds(frame, streams, kinds, payloads)


def noise(streams: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    whole = frames_of(streams)
    changes = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 255)), max_size=2)
    return st.one_of(
        whole,
        st.builds(mutated, whole, changes, st.integers(0, 12)),
        st.binary(max_size=40),
        st.just(wire.MARKER),
    )


# The host ---------------------------------------------------------------------------------------


async def hear(channel: Channel, op: str) -> tuple[bytes, Any]:
    """What a stream says, and how it ends."""
    said = b""
    try:
        async with channel.open(op) as stream:
            await use(stream)
            while (piece := await stream.read()) is not None:
                said += piece[1]
            return said, await stream.result()
    except GuestError as error:
        return said, error


async def use(stream: GuestStream) -> None:
    stream.resize(3, 4)
    stream.signal(2)
    await stream.write(b"input")


# The honest stream is 2; 3 and above never were.
@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(noise(st.sampled_from([0, 1, 1, 1, 3, 2**32 - 1])), max_size=4), st.integers(1, 9))
def test_a_channel_hears_frames_or_fails(noises: list[bytes], honest: int) -> None:
    async def converse() -> tuple[Any, Any]:
        async with connected() as (channel, peer):
            one = asyncio.create_task(hear(channel, "one"))
            other = asyncio.create_task(hear(channel, "other"))
            while [number for number, kind, _ in peer.heard if kind == wire.REQUEST] != [1, 2]:
                await peer.receive()
            for piece in [*noises, b""]:
                peer.write(frame(2, wire.STDOUT, HONEST[:honest]))
                peer.write(piece)
                await asyncio.sleep(0)
            peer.write(frame(2, wire.REPLY, b'{"honest": true}'))
            await peer.close()
            results = await together(one, other)
            return results[0], results[1]

    unhandled: list[dict[str, Any]] = []
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        (_, one_end), (said, end) = runner.run(converse())
        gc.collect()
    assert unhandled == []
    assert isinstance(one_end, dict | GuestError)
    assert (HONEST[:honest] * (len(noises) + 1)).startswith(said)
    if not isinstance(end, GuestError):
        assert end == {"honest": True}
        assert said == HONEST[:honest] * (len(noises) + 1)


# The agent --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentOnHost]:
    with agent_on_host() as running:
        yield running


#: Harmless whatever their fields: the agent is a process of this host.
requests = st.fixed_dictionaries(
    {"op": st.sampled_from(["hello", "exec", "attach", "processes", "signal", "dial", "no-such"])},
    optional={
        "argv": st.sampled_from([["true"], ["cat"], ["yes"], [], None, "true", [1]]),
        "stdin": st.sampled_from([True, False, 0, "x"]),
        "terminal": st.sampled_from([[24, 80], [0, 0], [-1, 1], ["a", "b"], [1], 7, {}]),
        "background": st.booleans(),
        "announce": st.booleans(),
        "user": st.sampled_from(["root", "no-such-user", 7, ":", "0:0"]),
        "timeout": st.sampled_from([0.01, 0, -1, "x", None, 1e300, float("nan"), float("inf")]),
        "pid": st.sampled_from([0, 1, -1, "x", None]),
        "signal": st.sampled_from([9, 0, -1, 1000, "x"]),
        "port": st.sampled_from([1, 0, -1, 70000, "x"]),
        "host": st.sampled_from(["127.0.0.1", "::1", "x", 7]),
        "path": st.sampled_from(["", "/no/such/socket", 7]),
    },
).map(lambda fields: json.dumps(fields).encode())
streams = st.integers(0, 3)
asked = st.builds(frame, streams, st.just(wire.REQUEST), requests)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(asked, asked, noise(streams)), max_size=8))
def test_an_agent_survives_whatever_it_is_sent(agent: AgentOnHost, pieces: list[bytes]) -> None:
    for piece in pieces:
        # Rebirth is trusted, and made by the host alone.
        if wire.REBIRTH not in piece[8:9]:
            agent.socket.sendall(piece)
    agent.begin()
    agent.hello()
    listing = agent.request("processes")
    for process in agent.reply(listing)["processes"]:
        if process["exit_code"] is None:
            agent.request("signal", pid=process["pid"], signal=9)
    agent.hello()
    assert agent.resident_bytes < 200 * MIB


def test_nothing_is_left_of_all_that(agent: AgentOnHost) -> None:
    with agent_on_host() as fresh:
        fresh.hello()
        usual = fresh.descriptors
    agent.begin()
    wait_for(lambda: agent.descriptors <= usual)
