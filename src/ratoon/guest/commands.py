"""Programs in the guest, from its start to its exit code."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ratoon.concurrency import beside
from ratoon.errors import GuestError, GuestTimeout
from ratoon.guest.agent import wire
from ratoon.guest.channel import Agent, GuestStream, printable

#: Bytes of output that `exec` keeps, of stdout and stderr each, unless told otherwise.
OUTPUT_LIMIT = 64 * 1024 * 1024
#: Seconds for the agent to report a command whose time is over; a loaded host is slow.
TIMEOUT_GRACE = 60.0


@dataclass(frozen=True)
class ExecResult:
    """How a command ended.

    `exit_code` is a shell's: 124 timed out, 126 not executable, 127 not found, 128 + n killed by
    signal n. `error` says why a program could not be started. `truncated`: it wrote more than
    was to be kept; what came after was dropped.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool = False
    error: str | None = None
    truncated: bool = False


async def exec(
    agent: Agent,
    argv: list[str],
    *,
    env: dict[str, str] | None = None,
    cwd: str | None = None,
    stdin: bytes = b"",
    timeout: float | None = None,
    output_limit: int = OUTPUT_LIMIT,
) -> ExecResult:
    """Run `argv` in the guest until it exits; after `timeout` seconds its group is killed.

    If the caller is cancelled, so is the command. `output_limit` bytes of stdout and of stderr are
    kept. GuestTimeout: the time is over, and the agent does not say what became of the command.
    """
    fields = {"argv": argv, "env": env, "cwd": cwd, "stdin": bool(stdin), "timeout": timeout}
    deadline = None if timeout is None else timeout + TIMEOUT_GRACE
    try:
        async with asyncio.timeout(deadline), agent.open("exec", **fields) as stream:
            if not stdin:
                return await _collect(stream, output_limit)
            return await beside(_collect(stream, output_limit), _feed(stream, stdin))
    except TimeoutError:
        raise GuestTimeout(
            f"the agent did not report the end of {argv[0]} within {deadline:g} s, "
            f"although its time is {timeout:g} s"
        ) from None


async def _feed(stream: GuestStream, stdin: bytes) -> None:
    await stream.write(stdin)
    stream.end_input()


async def _collect(stream: GuestStream, limit: int) -> ExecResult:
    output = {wire.STDOUT: bytearray(), wire.STDERR: bytearray()}
    truncated = False
    while (piece := await stream.read()) is not None:
        kind, data = piece
        room = limit - len(output[kind])
        output[kind] += data[:room]
        truncated = truncated or len(data) > room
    reply = await stream.result()
    exit_code = reply.get("exit_code")
    if type(exit_code) is not int or not 0 <= exit_code <= 255:
        raise GuestError(f"the agent of {stream.name} gave no exit code: {printable(reply)}")
    reason = reply.get("reason")
    return ExecResult(
        exit_code,
        bytes(output[wire.STDOUT]),
        bytes(output[wire.STDERR]),
        timed_out=reply.get("timed_out") is True,
        error=None if reason is None else printable(reason),
        truncated=truncated,
    )
