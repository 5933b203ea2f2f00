"""The host's end of the agent's port: many streams over one unix socket.

Whatever arrives here was written by the guest and is not trusted: frames and messages are bounded
by the decoder, replies are checked where they are used, and nonsense closes the channel.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratoon.concurrency import beside
from ratoon.errors import GuestError, GuestTimeout
from ratoon.guest.agent import wire

#: Bytes of output that `Channel.exec` keeps, of stdout and stderr each.
OUTPUT_LIMIT = 64 * 1024 * 1024


@dataclass(frozen=True)
class ExecResult:
    """How a command ended.

    `exit_code` is a shell's: 124 timed out, 126 not executable, 127 not found, 128 + n killed by
    signal n. `error` says why a program could not be started. `truncated`: it wrote more than
    OUTPUT_LIMIT bytes; what came after was dropped.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool = False
    error: str | None = None
    truncated: bool = False


class _Stream:
    """One request under way: what its frames mean to whoever waits for the reply."""

    def __init__(self, on_output: Callable[[int, bytes], None] | None = None) -> None:
        self.reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._on_output = on_output
        self._window = wire.STDIN_WINDOW
        self._window_moved = asyncio.Event()

    def receive(self, kind: int, payload: bytes) -> None:
        if kind == wire.REPLY:
            reply = json.loads(payload)
            if not isinstance(reply, dict):
                raise wire.ProtocolError("a reply that is no object")
            if not self.reply.done():
                self.reply.set_result(reply)
        elif kind in (wire.STDOUT, wire.STDERR) and self._on_output is not None:
            self._on_output(kind, payload)
        elif kind == wire.STDIN_TAKEN and len(payload) == 4:
            self._window = min(self._window + int.from_bytes(payload, "big"), wire.STDIN_WINDOW)
            self._window_moved.set()
        else:
            raise wire.ProtocolError(f"a frame of kind {kind} that nobody asked for")

    async def take_window(self, wanted: int) -> int:
        """How many of `wanted` bytes of stdin may be sent now; waits until it is at least one."""
        while not self._window:
            self._window_moved.clear()
            await self._window_moved.wait()
        taken = min(wanted, self._window)
        self._window -= taken
        return taken


class Channel(asyncio.Protocol):
    """Talks to one guest's agent; made by `Channel.connect`.

    After `begin` was answered the agent is at a fresh start, whatever it was saying before.
    Once the connection is lost, every request under way and every later one fails with GuestError.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._decoder = wire.Decoder()
        self._nonce: bytes | None = None
        self._streams: dict[int, _Stream] = {}
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
        message = json.dumps({"op": op, **fields}).encode()
        return await self._ask(op, wire.REQUEST, message, timeout)

    async def rebirth(self, name: str, *, timeout: float) -> None:
        """Give the guest a name, randomness and the time, and let its processes run."""
        fields = wire.REBIRTH_FIELDS.pack(
            time.time_ns(), secrets.token_hex(16).encode(), secrets.token_bytes(64)
        )
        await self._ask("rebirth", wire.REBIRTH, fields + name.encode(), timeout)

    async def _ask(self, op: str, kind: int, message: bytes, timeout: float) -> dict[str, Any]:
        stream = _Stream()
        number = self._open(stream, kind, message)
        try:
            async with asyncio.timeout(timeout):
                reply = await stream.reply
        except TimeoutError:
            raise GuestTimeout(
                f"the agent of {self._name} did not answer {op} within {timeout:g} s"
            ) from None
        finally:
            self._streams.pop(number, None)
        if "error" in reply:
            raise GuestError(f"the agent of {self._name} refused {op}: {reply['error']}")
        return reply

    async def exec(
        self,
        argv: list[str],
        *,
        env: dict[str, str] | None = None,
        cwd: str | None = None,
        stdin: bytes = b"",
        timeout: float | None = None,
    ) -> ExecResult:
        """Run `argv` in the sandbox until it exits; after `timeout` seconds its group is killed.

        If the caller is cancelled, so is the command.
        """
        output = {wire.STDOUT: bytearray(), wire.STDERR: bytearray()}
        truncated = False

        def keep(kind: int, data: bytes) -> None:
            nonlocal truncated
            room = OUTPUT_LIMIT - len(output[kind])
            output[kind] += data[:room]
            truncated = truncated or len(data) > room

        stream = _Stream(keep)
        fields = {"env": env, "cwd": cwd, "stdin": bool(stdin), "timeout": timeout}
        message = json.dumps({"op": "exec", "argv": argv, **fields}).encode()
        number = self._open(stream, wire.REQUEST, message)
        try:
            reply = await beside(_result(stream.reply), self._feed(number, stream, stdin))
        except asyncio.CancelledError:
            self._transport.write(wire.encode(number, wire.CANCEL))
            raise
        finally:
            self._streams.pop(number, None)
        exit_code = reply.get("exit_code")
        if type(exit_code) is not int or not 0 <= exit_code <= 255:
            raise GuestError(f"the agent of {self._name} refused exec: {reply.get('error', reply)}")
        problem = reply.get("error")
        return ExecResult(
            exit_code,
            bytes(output[wire.STDOUT]),
            bytes(output[wire.STDERR]),
            timed_out=reply.get("timed_out") is True,
            error=None if problem is None else str(problem),
            truncated=truncated,
        )

    def _open(self, stream: _Stream, kind: int, message: bytes) -> int:
        if self._lost is not None:
            raise GuestError(self._lost)
        if len(message) > wire.MAX_MESSAGE:
            raise GuestError(f"a request of {len(message)} bytes is more than the agent takes")
        self._last_stream += 1
        self._streams[self._last_stream] = stream
        self._transport.write(self._unsent + wire.encode(self._last_stream, kind, message))
        self._unsent = b""
        return self._last_stream

    async def _feed(self, number: int, stream: _Stream, stdin: bytes) -> None:
        if not stdin:
            return
        sent = 0
        while sent < len(stdin):
            count = await stream.take_window(len(stdin) - sent)
            self._transport.write(wire.encode(number, wire.STDIN, stdin[sent : sent + count]))
            sent += count
        self._transport.write(wire.encode(number, wire.STDIN_END))

    # asyncio.Protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._decoder.feed(data)
        try:
            if self._nonce is not None:
                if self._decoder.sync() != self._nonce:
                    self._decoder.discard()
                    return
                self._nonce = None
            for number, kind, payload in self._decoder.frames():
                stream = self._streams.get(number)
                if stream is not None:
                    stream.receive(kind, payload)
        except (wire.ProtocolError, ValueError, RecursionError) as error:
            self._fail(f"the agent of {self._name} sent nonsense ({error}); its channel is closed")
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"the channel to the agent of {self._name} is closed")

    def _fail(self, reason: str) -> None:
        self._lost = self._lost or reason
        for stream in self._streams.values():
            if not stream.reply.done():
                stream.reply.set_exception(GuestError(self._lost))
                stream.reply.exception()  # looked at: nobody may be waiting for it
        self._streams.clear()


async def _result(reply: asyncio.Future[dict[str, Any]]) -> dict[str, Any]:
    return await reply
