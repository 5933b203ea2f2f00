"""The host's end of the agent's port: many streams over one unix socket.

Whatever arrives here was written by the guest and is not trusted: frames and messages are bounded
by the decoder, output by its credit, replies are checked where they are used, and nonsense closes
the channel.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

from ratoon.api.answers import CommandEnd, MainCommand
from ratoon.errors import GuestError, GuestTimeout
from ratoon.machine.guest.shared import wire

#: Characters of what a guest says that go into an error message.
REASON_LIMIT = 2000
#: Pieces of output that a stream keeps apart; those after them are joined by kind, in place of
#: their order, so that a guest that sends a byte at a time takes no more memory than its credit.
MAX_PIECES = 64


class Agent(Protocol):
    """Whoever passes requests on to a guest's agent: a channel, or a sandbox, which outlives it."""

    async def request(self, op: str, *, timeout: float, **fields: Any) -> dict[str, Any]:
        """One question, one answer; GuestTimeout after `timeout` seconds, GuestError if refused."""

    def open(self, op: str, **fields: Any) -> AbstractAsyncContextManager[GuestStream]:
        """A question whose answer takes a conversation; leaving it early cancels it."""


class GuestStream:
    """One conversation with the agent; an `async with` block, which sends the request.

    Leaving the block before the reply is there cancels what was asked for. Every method raises
    GuestError once the channel is lost.
    """

    def __init__(self, channel: Channel, what: str, kind: int, message: bytes) -> None:
        #: The channel's, for messages.
        self.name = channel.name
        self._channel = channel
        self._what = what
        self._opening = kind, message
        self._number = 0
        self._changed = asyncio.Event()
        self._pieces: deque[tuple[int, bytearray]] = deque()
        #: Output that the guest may still send, and what was read since credit was last given.
        self._credit = wire.OUTPUT_WINDOW
        self._read = 0
        self._input_credit = wire.STDIN_WINDOW
        self._ended_outputs: set[int] = set()
        self._started: dict[str, Any] | None = None
        self._reply: dict[str, Any] | None = None
        self._lost: str | None = None

    async def __aenter__(self) -> GuestStream:
        self._number = self._channel._enter(self, *self._opening)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._reply is None and self._lost is None:
            self._send(wire.CANCEL)
        self._channel._leave(self._number)
        self._fail("the conversation is over")

    async def started(self) -> dict[str, Any]:
        """What the agent says of what it has begun; where it refused or has ended, the reply."""
        await self._until(lambda: self._started is not None or self._reply is not None)
        return self._answer() if self._started is None else self._started

    async def read(self) -> tuple[int, bytes] | None:
        """The next output, STDOUT or STDERR and its bytes; None: all is read, the reply is there.

        Empty bytes: no more of this kind will come. What is not read holds up nobody else.
        """
        await self._until(lambda: bool(self._pieces) or self._reply is not None)
        if not self._pieces:
            return None
        kind, data = self._pieces.popleft()
        self._read += len(data)
        if self._read >= wire.OUTPUT_WINDOW // 2 and self._reply is None:
            self._credit += self._read
            self._send(wire.OUTPUT_TAKEN, wire.CREDIT.pack(self._read))
            self._read = 0
        return kind, bytes(data)

    async def write(self, data: bytes) -> None:
        """Send input; waits for the guest to take it. After the stream's end it is dropped."""
        view, sent = memoryview(data), 0
        while sent < len(view):
            await self._until(lambda: bool(self._input_credit) or self._reply is not None)
            if self._reply is not None:
                return
            piece = view[sent : sent + self._input_credit]
            self._input_credit -= len(piece)
            self._send(wire.STDIN, bytes(piece))
            sent += len(piece)

    def end_input(self) -> None:
        """No more input will come."""
        self._send(wire.STDIN_END)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of the stream's terminal."""
        self._send(wire.RESIZE, wire.SIZE.pack(rows, columns))

    def signal(self, number: int) -> None:
        """Send a signal to the stream's process group."""
        self._send(wire.SIGNAL, bytes([number]))

    async def result(self) -> dict[str, Any]:
        """The reply; output that was not read is dropped. GuestError: the agent refused."""
        while await self.read() is not None:
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._reply is not None
        if "error" in self._reply:
            raise GuestError(
                f"the agent of {self.name} refused {self._what}: {printable(self._reply['error'])}",
                kind=printable(self._reply.get("kind", "")),
            )
        return self._reply

    def _send(self, kind: int, payload: bytes = b"") -> None:
        if self._lost is not None:
            raise GuestError(self._lost)
        if self._reply is None:
            self._channel._send(self._number, kind, payload)

    async def _until(self, met: Callable[[], bool]) -> None:
        while not met():
            if self._lost is not None:
                raise GuestError(self._lost)
            self._changed.clear()
            await self._changed.wait()

    # What the channel tells it ------------------------------------------------------------------

    def _receive(self, kind: int, payload: bytes) -> bool:
        """Take in a frame; True if it was the last. ProtocolError if nobody asked for it."""
        if kind == wire.REPLY:
            self._reply = _object(payload)
        elif kind in wire.OUTPUTS:
            self._receive_output(kind, payload)
        elif kind == wire.STDIN_TAKEN and len(payload) == wire.CREDIT.size:
            taken = self._input_credit + wire.CREDIT.unpack(payload)[0]
            self._input_credit = min(taken, wire.STDIN_WINDOW)
        elif kind == wire.STARTED and self._started is None:
            self._started = _object(payload)
        else:
            raise wire.ProtocolError(f"a frame of kind {kind} that nobody asked for")
        self._changed.set()
        return self._reply is not None

    def _receive_output(self, kind: int, payload: bytes) -> None:
        if len(payload) > self._credit:
            raise wire.ProtocolError("more output than it has credit for")
        if kind in self._ended_outputs:
            raise wire.ProtocolError("output after its end")
        self._credit -= len(payload)
        pieces = self._pieces
        if not payload:
            self._ended_outputs.add(kind)
        elif pieces and pieces[-1][0] == kind:
            pieces[-1][1].extend(payload)
            return
        elif len(pieces) > MAX_PIECES and pieces[-2][0] == kind:
            pieces[-2][1].extend(payload)
            return
        pieces.append((kind, bytearray(payload)))

    def _fail(self, reason: str) -> None:
        if self._reply is None and self._lost is None:
            self._lost = reason
        self._changed.set()


class _Question(GuestStream):
    """A stream that is one question and one answer: with no output in between."""

    def _receive_output(self, kind: int, payload: bytes) -> None:
        raise wire.ProtocolError(f"a frame of kind {kind} that nobody asked for")


class Channel(asyncio.Protocol):
    """Talks to one guest's agent; made by `Channel.connect`.

    After `begin` was answered the agent is at a fresh start, whatever it was saying before.
    Once the connection is lost, every stream under way and every later one fails with GuestError.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._decoder = wire.Decoder()
        #: How the guest's main command is, as far as was told; `on_command` hears of changes.
        self.command: MainCommand | None = None
        self.on_command: Callable[[MainCommand], object] | None = None
        self._nonce: bytes | None = None
        self._streams: dict[int, GuestStream] = {}
        self._last_stream = 0
        self._lost: str | None = None
        self._unsent = b""
        self._transport: asyncio.Transport

    @classmethod
    async def connect(cls, path: Path, name: str) -> Channel:
        """Connect to the agent's socket; `name` (a sandbox) goes into error messages."""
        loop = asyncio.get_running_loop()
        try:
            _, channel = await loop.create_unix_connection(lambda: cls(name), str(path))
        except OSError as error:
            raise GuestError(f"cannot reach the agent of {name}: {error}") from error
        return channel

    def begin(self) -> None:
        """Start a session with the next request; what arrives before the answer is dropped."""
        self._nonce = os.urandom(wire.NONCE_BYTES)
        self._unsent = wire.MARKER + self._nonce

    def close(self) -> None:
        self._transport.abort()

    async def request(self, op: str, *, timeout: float, **fields: Any) -> dict[str, Any]:
        """One question, one answer; GuestTimeout after `timeout` seconds, GuestError if refused."""
        return await self._ask(op, wire.REQUEST, _message(op, fields), timeout)

    def open(self, op: str, **fields: Any) -> GuestStream:
        """A question whose answer takes a conversation; leaving it early cancels it."""
        return GuestStream(self, op, wire.REQUEST, _message(op, fields))

    async def rebirth(
        self, name: str, machine_id: str, kind: int = wire.FORK, *, timeout: float
    ) -> bool:
        """Give the guest names, randomness and the time, and let its processes run.

        `kind`: wire.RESUME for the individual that it was before a standby, whose names stay; with
        wire.ONLINE it has a way out, and without it none.
        Returns whether it has mounts of volumes from before.
        GuestError names what the guest's own part failed in, such as a hook.
        """
        fields = wire.REBIRTH_FIELDS.pack(
            kind,
            time.time_ns(),
            machine_id.encode(),
            secrets.token_bytes(64),
        )
        reply = await self._ask("rebirth", wire.REBIRTH, fields + name.encode(), timeout)
        return reply.get("volumes") is True

    async def _ask(self, op: str, kind: int, message: bytes, timeout: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout), _Question(self, op, kind, message) as question:
                return await question.result()
        except TimeoutError:
            raise GuestTimeout(
                f"the agent of {self.name} did not answer {op} within {timeout:g} s"
            ) from None

    # What streams ask of it ---------------------------------------------------------------------

    def _enter(self, stream: GuestStream, kind: int, message: bytes) -> int:
        if self._lost is not None:
            raise GuestError(self._lost)
        if len(message) > wire.MAX_MESSAGE:
            raise GuestError(f"a request of {len(message)} bytes is more than the agent takes")
        self._last_stream += 1
        self._streams[self._last_stream] = stream
        self._transport.write(self._unsent + wire.encode(self._last_stream, kind, message))
        self._unsent = b""
        return self._last_stream

    def _leave(self, number: int) -> None:
        self._streams.pop(number, None)

    def _send(self, number: int, kind: int, payload: bytes) -> None:
        self._transport.write(wire.encode(number, kind, payload))

    # asyncio.Protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._last_stream:
            return  # nothing was asked yet: a fork, say, finishing what its source was saying
        self._decoder.feed(data)
        try:
            if self._nonce is not None:
                if self._decoder.sync() != self._nonce:
                    self._decoder.discard()
                    return
                self._nonce = None
            for number, kind, payload in self._decoder.frames():
                self._receive(number, kind, payload)
        except (wire.ProtocolError, ValueError, RecursionError) as error:
            self._fail(
                f"the agent of {self.name} sent nonsense ({printable(error)}); "
                "its channel is closed"
            )
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the channel to the agent of {self.name} is closed")

    def _receive(self, number: int, kind: int, payload: bytes) -> None:
        if kind == wire.COMMAND:
            before, self.command = self.command, _main_command(_object(payload))
            if self.on_command and self.command != before:
                self.on_command(self.command)
            return
        stream = self._streams.get(number)
        if stream is None:
            if not 0 < number <= self._last_stream:
                raise wire.ProtocolError(f"a frame of stream {number}, which never was")
        elif stream._receive(kind, payload):
            del self._streams[number]

    def _fail(self, reason: str) -> None:
        self._lost = self._lost or reason
        for stream in self._streams.values():
            stream._fail(self._lost)
        self._streams.clear()


def printable(text: object) -> str:
    """What a guest has said, fit for a message to a person: bounded, and without control codes."""
    shown = str(text)[:REASON_LIMIT]
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in shown)


def _main_command(told: dict[str, Any]) -> MainCommand:
    pid, exit_code = told.get("pid"), told.get("exit_code")
    if type(pid) is not int or not (exit_code is None or is_exit_code(exit_code)):
        raise wire.ProtocolError("a main command that cannot be")
    if exit_code is None:
        return MainCommand(pid)
    reason = "its time was over" if told.get("timed_out") is True else told.get("reason")
    return MainCommand(pid, CommandEnd(exit_code, None if reason is None else printable(reason)))


def is_exit_code(told: object) -> bool:
    """Whether what a guest has told is an exit code."""
    return type(told) is int and 0 <= told <= 255


def _message(op: str, fields: dict[str, Any]) -> bytes:
    return json.dumps({"op": op, **fields}).encode()


def _object(payload: bytes) -> dict[str, Any]:
    found = json.loads(payload)
    if not isinstance(found, dict):
        raise wire.ProtocolError("a message that is no object")
    return found
