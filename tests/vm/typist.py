"""Somebody who sits at a terminal, and types what `ratoon` is to do."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
import termios
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from vm_helpers import FOR_EVER

PROGRAM = Path(sys.executable).with_name("ratoon")


class Typist:
    """Sits at a terminal that `ratoon` runs on."""

    def __init__(self, keyboard: int, process: Process) -> None:
        self.process = process
        self._keyboard = keyboard
        self.seen = b""

    def type(self, text: bytes) -> None:
        os.write(self._keyboard, text)

    async def see(self, text: bytes) -> None:
        """Wait until `text` is shown, after what was seen before."""
        async with asyncio.timeout(FOR_EVER):
            while text not in self.seen:
                self.seen += await asyncio.to_thread(os.read, self._keyboard, 4096)
        self.seen = self.seen.partition(text)[2]

    async def end(self) -> int:
        code = await asyncio.wait_for(self.process.wait(), FOR_EVER)
        os.set_blocking(self._keyboard, False)
        with suppress(BlockingIOError):
            self.seen += os.read(self._keyboard, 4096)
        print(self.seen.decode(errors="replace"))  # for who looks into a failure
        return code


@asynccontextmanager
async def terminal(environment: dict[str, str], *arguments: str) -> AsyncIterator[Typist]:
    """`ratoon` on a terminal of 30 rows and 100 columns, which must be as it was in the end."""
    keyboard, screen = pty.openpty()
    termios.tcsetwinsize(keyboard, (30, 100))
    before = termios.tcgetattr(screen)
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        *arguments,
        stdin=screen,
        stdout=screen,
        stderr=screen,
        env=environment,
        start_new_session=True,
    )
    try:
        yield Typist(keyboard, process)
        assert termios.tcgetattr(screen) == before
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(keyboard)
        os.close(screen)
