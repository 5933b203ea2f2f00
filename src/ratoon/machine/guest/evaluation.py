"""Code in the sandbox's warm interpreter, from the text to its result."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ratoon.errors import GuestError, GuestTimeout, NoPython
from ratoon.machine.guest.channel import Agent, GuestStream, printable
from ratoon.machine.guest.commands import OUTPUT_LIMIT
from ratoon.machine.guest.shared import wire
from ratoon.machine.guest.shared.outcome import read_outcome

#: Seconds for the agent to report code whose time is over: it is interrupted, and if that does not
#: help killed; a loaded host is slow.
TIMEOUT_GRACE = 70.0

#: What is given output as it comes. While it is awaited no more is read, and in the end the code
#: waits too.
Listener = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True)
class EvalResult:
    """How code ended.

    `result` is the `repr` of the last statement, where that is an expression whose value is not
    None. `error` is the traceback, or what else went wrong. `exit_code`: 0, 1 for an exception, 124
    timed out, else what the code gave to `sys.exit`, or how the interpreter ended. `state_lost`:
    the interpreter is gone, with all that was in it, and the next evaluation starts a new one.
    `truncated`: there was more of the result, the error or the output than was to be kept.
    """

    result: str | None
    error: str | None
    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool = False
    state_lost: bool = False
    truncated: bool = False


async def evaluate(
    agent: Agent,
    code: str,
    *,
    timeout: float | None = None,
    on_stdout: Listener | None = None,
    on_stderr: Listener | None = None,
    output_limit: int = OUTPUT_LIMIT,
) -> EvalResult:
    """Run Python `code` in the guest's interpreter, which keeps its state from call to call.

    It waits for evaluations that were begun before. After `timeout` seconds, the wait included, the
    code is interrupted, as by Ctrl-C, and the state is kept; code that does not heed it is killed
    with the interpreter. If the caller is cancelled, the code is interrupted too.

    Output goes to `on_stdout` and `on_stderr` as it comes; without them, `output_limit` bytes of
    each are kept for the result. NoPython: the sandbox has none. GuestTimeout: the time is over,
    and the agent does not say what became of the code.
    """
    deadline = None if timeout is None else timeout + TIMEOUT_GRACE
    listeners = {wire.STDOUT: on_stdout, wire.STDERR: on_stderr}
    try:
        async with (
            asyncio.timeout(deadline) as limit,
            agent.open("eval", code=code, timeout=timeout) as stream,
        ):
            return await _collect(stream, listeners, output_limit)
    except GuestError as error:
        if error.kind == "no-python":
            raise NoPython(str(error)) from None
        raise
    except TimeoutError:
        if not limit.expired():  # a listener's own
            raise
        raise GuestTimeout(
            f"the agent did not report the end of an evaluation within {deadline:g} s, "
            f"although its time is {timeout:g} s"
        ) from None


async def _collect(
    stream: GuestStream, listeners: dict[int, Listener | None], limit: int
) -> EvalResult:
    output = {wire.STDOUT: bytearray(), wire.STDERR: bytearray()}
    truncated = False
    while (piece := await stream.read()) is not None:
        kind, data = piece
        listener = listeners[kind]
        if listener is not None:
            await listener(data)
            continue
        room = limit - len(output[kind])
        output[kind] += data[:room]
        truncated = truncated or len(data) > room
    reply = await stream.result()
    try:
        outcome = read_outcome(reply)
    except ValueError as error:
        raise GuestError(f"the agent of {stream.name} gave {error}: {printable(reply)}") from None
    return EvalResult(
        _text(outcome["result"]),
        _text(outcome["reason"]),
        outcome["exit_code"],
        bytes(output[wire.STDOUT]),
        bytes(output[wire.STDERR]),
        timed_out=outcome["timed_out"],
        state_lost=outcome["state_lost"],
        truncated=truncated or outcome["truncated"],
    )


def _text(text: str | None) -> str | None:
    """Text that can be encoded: a lone surrogate of the code's is replaced."""
    return None if text is None else text.encode(errors="replace").decode()
