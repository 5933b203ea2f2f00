"""A command in a sandbox, and whoever sits before it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from ratoon.cli import terminal
from ratoon.cli.app import say
from ratoon.concurrency import run_alongside
from ratoon.errors import Conflict, InvalidInput, NotFound, RatoonError, Unreachable

if TYPE_CHECKING:
    from ratoon.client.aio.commands import AsyncCommand
    from ratoon.client.output import CommandResult

_STDIN, _STDOUT, _STDERR = 0, 1, 2
#: What whoever ends this may mean for the command.
_PASSED_ON = signal.SIGINT, signal.SIGTERM

T = TypeVar("T")


class Detached(Exception):
    """The keys for it were typed."""


def require_terminal() -> None:
    """InvalidInput, if there is none here to be the command's."""
    if not os.isatty(_STDIN) or not os.isatty(_STDOUT):
        raise InvalidInput("-t: stdin and stdout are not a terminal; leave -t out")


def size_here() -> tuple[int, int]:
    """Rows and columns of the terminal here."""
    return terminal.size(_STDOUT)


async def follow(command: AsyncCommand, *, stdin: bool, on_terminal: bool) -> int:
    """Show what a command writes, and give it what is typed, until it ends; its exit code.

    Detached: the keys for it were typed, on a terminal.
    """
    sys.stdout.flush()
    with ExitStack() as held:
        if on_terminal and stdin:
            held.enter_context(terminal.raw(_STDIN))
        shown = _show(command)
        if stdin:
            shown = run_alongside(shown, _type(command, on_terminal))
        await signalled(command, shown)
    ended = await command.wait(check=False)
    if ended.reason:
        say(f"ratoon: {ended.reason}")
    elif ended.timed_out:
        say("ratoon: the command took too long, and was killed")
    return ended.exit_code


async def collect(command: AsyncCommand, stdin: bytes | None) -> CommandResult:
    """How a command ended that was given `stdin`, with all of its output."""

    async def feed() -> None:
        with suppress(Unreachable):  # it has ended, or will say itself what is wrong
            if stdin is not None:
                await command.send_stdin(stdin)
                await command.close_stdin()

    return await signalled(command, run_alongside(command.wait(check=False), feed()))


async def signalled(command: AsyncCommand, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. The first SIGINT or SIGTERM meanwhile is for the command.

    The second ends what this is a part of, and so does each afterwards.
    """
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    first = loop.create_future()

    def hear(number: int) -> None:
        if first.done():
            task.cancel()
        else:
            first.set_result(number)

    async def pass_on() -> None:
        number = await first
        with suppress(Conflict, NotFound):  # it has ended just now
            await command.signal(number)

    for number in _PASSED_ON:
        loop.add_signal_handler(number, hear, number)
    try:
        return await run_alongside(work, pass_on())
    finally:
        for number in _PASSED_ON:
            loop.add_signal_handler(number, task.cancel)


async def _show(command: AsyncCommand) -> None:
    async for output in command:
        await terminal.write(_STDOUT if output.stream == "stdout" else _STDERR, output.data)


async def _type(command: AsyncCommand, on_terminal: bool) -> None:
    """Never ends by itself: the command does."""
    loop = asyncio.get_running_loop()
    resized = asyncio.Event()
    if on_terminal:
        loop.add_signal_handler(signal.SIGWINCH, resized.set)
    try:
        await run_alongside(_pass_on(command, on_terminal), _resize(command, resized))
    finally:
        if on_terminal:
            loop.remove_signal_handler(signal.SIGWINCH)


async def _resize(command: AsyncCommand, resized: asyncio.Event) -> None:
    while True:
        await resized.wait()
        resized.clear()
        await command.resize(*size_here())


async def _pass_on(command: AsyncCommand, on_terminal: bool) -> None:
    keys = terminal.Keys()
    with suppress(Unreachable):  # it has ended, or will say itself what is wrong
        while data := await terminal.read(_STDIN):
            passed, detached = keys.typed(data) if on_terminal else (data, False)
            if passed:
                await command.send_stdin(passed)
            if detached:
                raise Detached
        await command.close_stdin()
    await asyncio.get_running_loop().create_future()


async def abandon(command: AsyncCommand) -> None:
    """End a command that would go on in the background, although nobody wants it any more."""
    with suppress(RatoonError):
        await command.kill()
