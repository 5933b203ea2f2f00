"""This end of a conversation: what is typed here, what is shown here, and the terminal's state."""

from __future__ import annotations

import asyncio
import os
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK = 64 * 1024
#: What a pipe takes at once if it takes anything (pipe(7), PIPE_BUF).
_ATOMIC = 4096
#: Ctrl-P Ctrl-Q, as with Docker.
DETACH = b"\x10\x11"


async def read(fd: int) -> bytes:
    """What there is to read from `fd`; empty at its end. It stays blocking: others share it."""
    await _ready(fd, reading=True)
    try:
        return os.read(fd, CHUNK)
    except OSError:  # a terminal that was hung up
        return b""


async def write(fd: int, data: bytes) -> None:
    """Write all of `data` to `fd`, which others share as well. BrokenPipeError: nobody reads."""
    left = memoryview(data)
    while left:
        await _ready(fd, reading=False)
        left = left[os.write(fd, left[:_ATOMIC]) :]


async def _ready(fd: int, *, reading: bool) -> None:
    """Wait until `fd` can be used; a file always can, and epoll does not take it."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def tell() -> None:
        if not ready.done():
            ready.set_result(None)

    try:
        (loop.add_reader if reading else loop.add_writer)(fd, tell)
    except PermissionError:
        return
    try:
        await ready
    finally:
        (loop.remove_reader if reading else loop.remove_writer)(fd)


def size(fd: int) -> tuple[int, int]:
    """Rows and columns of the terminal `fd`; of one that does not know, the usual ones."""
    columns, rows = os.get_terminal_size(fd)
    return rows or 24, columns or 80


@contextmanager
def raw(fd: int) -> Iterator[None]:
    """Within the block, every key of the terminal `fd` is passed on as it is."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


class Keys:
    """Looks for the keys that detach, in what is typed."""

    def __init__(self) -> None:
        self._begun = False

    def typed(self, data: bytes) -> tuple[bytes, bool]:
        """What of it is for the program, and whether the keys were among it.

        The first of them is held back until the next shows what it was for.
        """
        passed = bytearray()
        for value in data:
            key = bytes([value])
            if self._begun and key == DETACH[1:]:
                return bytes(passed), True
            if self._begun:
                passed += DETACH[:1]
            self._begun = key == DETACH[:1]
            if not self._begun:
                passed += key
        return bytes(passed), False
