"""A command in a sandbox, and whoever sits before it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from ratoon.cli import terminal
from ratoon.cli.app import say
from ratoon.concurrency import run_alongside
from ratoon.errors import InvalidInput, RatoonError, Unreachable

if TYPE_CHECKING:
    from ratoon.client.aio.commands import AsyncCommand

_STDIN, _STDOUT, _STDERR = 0, 1, 2


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
        if stdin:
            await run_alongside(_show(command), _type(command, on_terminal))
        else:
            await _show(command)
    ended = await command.wait(check=False)
    if ended.reason:
        say(f"ratoon: {ended.reason}")
    elif ended.timed_out:
        say("ratoon: the command took too long, and was killed")
    return ended.exit_code


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
