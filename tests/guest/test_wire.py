"""Frames: what is sent arrives, however the stream is cut; a MARKER is found in any garbage."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ratoon.machine.guest.shared import wire
from ratoon.machine.guest.shared.wire import HEADER, MARKER, MAX_MESSAGE, MAX_PAYLOAD, NONCE_BYTES

Frame = tuple[int, int, bytes]

NONCE = bytes(range(NONCE_BYTES))
SENT_KINDS = sorted(wire.KINDS - {wire.PART})

#: Beginnings, ends and wholes of MARKER: what a careless decoder stumbles over.
shards = st.builds(
    lambda start, end: MARKER[start:end], st.integers(0, 15), st.integers(1, len(MARKER))
)
fillers = st.builds(
    lambda length: b"x" * length,
    st.sampled_from([1, 7, MAX_PAYLOAD - 9, MAX_PAYLOAD - 1, MAX_PAYLOAD, 2 * MAX_PAYLOAD + 5]),
)
payloads = st.lists(st.one_of(st.binary(max_size=20), shards, st.just(MARKER), fillers), max_size=6)
small_payloads = st.lists(st.one_of(st.binary(max_size=20), shards, st.just(MARKER)), max_size=4)
streams = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))


def frames_of(contents: st.SearchStrategy[list[bytes]]) -> st.SearchStrategy[list[Frame]]:
    frame = st.tuples(streams, st.sampled_from(SENT_KINDS), contents.map(b"".join))
    return st.lists(frame, max_size=5)


def encoded(frames: Sequence[Frame]) -> bytes:
    return b"".join(wire.encode(*frame) for frame in frames)


def cut(data: bytes, seed: int, size: int) -> Iterator[bytes]:
    """`data` in chunks of at most `size` bytes, of lengths that `seed` decides."""
    draw = random.Random(seed)
    places = [0]
    while places[-1] < len(data):
        places.append(min(len(data), places[-1] + draw.randint(1, size)))
    return (data[start:end] for start, end in pairwise(places))


seeds = st.integers(0, 2**16)
sizes = st.sampled_from([1, 3, 16, 31, 33, 100, 40_000, 1 << 20])


def joined(frames: Sequence[Frame]) -> list[Frame]:
    """Byte streams may arrive in other pieces than they were sent in; messages may not."""
    out: list[Frame] = []
    for stream, kind, payload in frames:
        if out and out[-1][:2] == (stream, kind) and kind not in wire.MESSAGES:
            out[-1] = (stream, kind, out[-1][2] + payload)
        else:
            out.append((stream, kind, payload))
    return out


def receive(data: bytes, seed: int, size: int) -> list[Frame]:
    decoder = wire.Decoder()
    out = []
    for chunk in cut(data, seed, size if len(data) < 10_000 else max(size, 1000)):
        decoder.feed(chunk)
        assert decoder.sync() is None
        out += decoder.frames()
    return out


@settings(deadline=None)
@given(frames_of(payloads), seeds, sizes)
def test_what_is_sent_arrives_however_it_is_cut(frames: list[Frame], seed: int, size: int) -> None:
    assert joined(receive(encoded(frames), seed, size)) == joined(frames)


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), shards, frames_of(small_payloads).map(encoded))))
@example([MARKER[:8], wire.encode(1, wire.STDOUT, MARKER[8:] + NONCE)])
@example([HEADER.pack(40, 1, wire.STDOUT), MARKER + NONCE, wire.encode(1, wire.STDOUT, b"x")])
def test_a_frame_that_comes_alone_is_taken_for_what_it_is(chunks: list[bytes]) -> None:
    """Whatever comes: with the short way or without, the same is heard."""
    fast, slow = Listener(), Listener()
    for chunk in chunks:
        frame = fast.decoder.only_frame(chunk)
        if frame is None:
            fast.hear(chunk)
        else:
            fast.frames.append(frame)
        slow.hear(chunk)
        assert (fast.nonce, fast.frames) == (slow.nonce, slow.frames)


@settings(deadline=None)
@given(frames_of(payloads))
def test_frames_never_contain_the_marker(frames: list[Frame]) -> None:
    assert MARKER not in encoded(frames)


@pytest.mark.parametrize("overlap", range(len(MARKER) + 1))
def test_no_marker_across_the_end_of_a_frame(overlap: int) -> None:
    payload = b"x" * (MAX_PAYLOAD - overlap) + MARKER + b"y"
    data = wire.encode(1, wire.STDOUT, payload)
    assert MARKER not in data
    assert joined(receive(data, 0, 5000)) == [(1, wire.STDOUT, payload)]


def test_the_payload_may_be_markers_alone() -> None:
    payload = MARKER * 500
    data = wire.encode(2**32 - 1, wire.REPLY, payload)
    assert MARKER not in data
    assert receive(data, 1, 50) == [(2**32 - 1, wire.REPLY, payload)]


@pytest.mark.parametrize("kind", sorted(wire.MESSAGES))
@pytest.mark.parametrize("length", [0, 1, MAX_PAYLOAD, MAX_PAYLOAD + 1, MAX_MESSAGE])
def test_a_message_comes_whole(kind: int, length: int) -> None:
    message = random.Random(length).randbytes(length)
    assert receive(wire.encode(7, kind, message), 3, 100_000) == [(7, kind, message)]


@pytest.mark.parametrize("excess", [1, MAX_PAYLOAD, 2 * MAX_PAYLOAD])
def test_a_message_that_is_too_large_is_refused(excess: int) -> None:
    data = wire.encode(7, wire.REPLY, b"x" * (MAX_MESSAGE + excess))
    with pytest.raises(wire.ProtocolError, match="4194304"):
        receive(data, 3, 100_000)


def test_nothing_comes_between_the_parts_of_a_message() -> None:
    part = HEADER.pack(2, 1, wire.PART) + b"{}"
    for intruder in (wire.encode(2, wire.REPLY, b"{}"), wire.encode(1, wire.STDOUT, b"{}")):
        with pytest.raises(wire.ProtocolError, match="middle of a message"):
            receive(part + intruder, 0, 1000)


# A fresh start --------------------------------------------------------------------------------


class Listener:
    """Receives as the agent does: every MARKER begins a session."""

    def __init__(self) -> None:
        self.decoder = wire.Decoder()
        self.nonce: bytes | None = None
        self.frames: list[Frame] = []

    def hear(self, chunk: bytes) -> None:
        self.decoder.feed(chunk)
        nonce = self.decoder.sync()
        if nonce is not None:
            self.nonce, self.frames = nonce, []
        try:
            self.frames += self.decoder.frames()
        except wire.ProtocolError:
            self.decoder.discard()


class Asker(Listener):
    """Receives as the host does: all is dropped up to the answer to its own nonce."""

    def hear(self, chunk: bytes) -> None:
        self.decoder.feed(chunk)
        if self.nonce != NONCE:
            self.nonce = self.decoder.sync()
            if self.nonce != NONCE:
                self.decoder.discard()
                return
        self.frames += self.decoder.frames()


def truncated(data: bytes, length: int) -> bytes:
    return data[: max(0, len(data) - length)]


#: What an older session may have left: whole and half frames, half greetings, noise.
leftovers = st.lists(
    st.one_of(
        st.binary(max_size=50),
        shards,
        st.builds(truncated, frames_of(small_payloads).map(encoded), st.integers(0, 30)),
        st.builds(truncated, st.just(MARKER + b"\xee" * NONCE_BYTES), st.integers(0, 31)),
        st.builds(truncated, st.just(MARKER + MARKER), st.integers(0, 31)),
        st.builds(lambda length: HEADER.pack(length, 1, wire.STDIN), st.integers(0, MAX_PAYLOAD)),
    ),
    max_size=5,
).map(b"".join)


@settings(deadline=None, max_examples=400)
@given(leftovers, frames_of(small_payloads), seeds, sizes)
@example(MARKER + b"old", [(1, wire.REQUEST, b"{}")], 0, 1)
@example(HEADER.pack(10, 1, wire.STDIN), [(1, wire.REQUEST, b"{}")], 0, 1)
def test_a_marker_begins_anew_whatever_came_before(
    garbage: bytes, frames: list[Frame], seed: int, size: int
) -> None:
    data = garbage + MARKER + NONCE + encoded(frames)
    for listener in (Listener(), Asker()):
        for chunk in cut(data, seed, size):
            listener.hear(chunk)
        assert listener.nonce == NONCE
        assert joined(listener.frames) == joined(frames)


@settings(deadline=None)
@given(st.integers(0, 15), seeds, sizes)
def test_the_last_marker_wins(kept: int, seed: int, size: int) -> None:
    old = MARKER + b"o" * NONCE_BYTES + wire.encode(1, wire.STDIN, b"old")
    half = MARKER + b"h" * kept
    listener = Listener()
    for chunk in cut(old + half + MARKER + NONCE + wire.encode(1, wire.STDIN_END), seed, size):
        listener.hear(chunk)
    assert listener.nonce == NONCE
    assert listener.frames == [(1, wire.STDIN_END, b"")]


@pytest.mark.parametrize("known", range(wire.SYNC_BYTES))
def test_discard_keeps_what_may_begin_a_marker(known: int) -> None:
    greeting = MARKER + NONCE
    decoder = wire.Decoder()
    decoder.feed(b"\x00" * 1000 + greeting[:known])
    assert decoder.sync() is None
    decoder.discard()
    decoder.feed(greeting[known:])
    assert decoder.sync() == NONCE


# Nonsense -------------------------------------------------------------------------------------

noise = st.lists(
    st.one_of(
        st.binary(max_size=60),
        shards,
        st.just(MARKER),
        frames_of(small_payloads).map(encoded),
        st.builds(HEADER.pack, streams, streams, st.integers(0, 255)),
    ),
    max_size=6,
).map(b"".join)


@settings(deadline=None)
@given(noise, seeds, sizes, st.booleans())
def test_any_bytes_are_frames_or_a_protocol_error(
    data: bytes, seed: int, size: int, ask: bool
) -> None:
    decoder = wire.Decoder()
    for chunk in cut(data, seed, size):
        decoder.feed(chunk)
        if ask:
            decoder.sync()
        try:
            frames = decoder.frames()
        except wire.ProtocolError:
            decoder.discard()
        else:
            assert all(kind in SENT_KINDS for _, kind, _ in frames)


def endless(piece: bytes, chunks: int = 200) -> Iterator[bytes]:
    chunk = piece * (64 * 1024 // len(piece) + 1)
    for _ in range(chunks):
        yield chunk


def many_streams() -> Iterator[bytes]:
    for start in range(0, 100_000, 1000):
        numbers = range(start, start + 1000)
        yield b"".join(HEADER.pack(0, stream, wire.PART) for stream in numbers)


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(lambda: endless(b"\xf1"), id="noise"),
        pytest.param(lambda: endless(MARKER), id="markers"),
        pytest.param(lambda: endless(MARKER[:9]), id="beginnings of markers"),
        pytest.param(lambda: endless(HEADER.pack(99, 1, wire.PART) + b"x" * 99), id="small parts"),
        pytest.param(lambda: endless(HEADER.pack(0, 1, wire.PART), 20), id="empty parts"),
        pytest.param(many_streams, id="parts of many streams"),
        pytest.param(
            lambda: endless(HEADER.pack(MAX_PAYLOAD, 1, wire.PART) + b"x" * MAX_PAYLOAD),
            id="a message without an end",
        ),
    ],
)
@pytest.mark.parametrize("ask", [True, False], ids=["agent", "host"])
def test_the_decoder_holds_a_message_at_most(chunks: object, ask: bool) -> None:
    assert callable(chunks)
    decoder = wire.Decoder()
    tracemalloc.start()
    try:
        for chunk in chunks():
            decoder.feed(chunk)
            if ask:
                decoder.sync()
            try:
                decoder.frames()
            except wire.ProtocolError:
                decoder.discard()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < MAX_MESSAGE + 2 * 1024 * 1024
    assert peak < 3 * MAX_MESSAGE
