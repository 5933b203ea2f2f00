"""A guest that stands still though nobody paused it: its disk cannot take what it writes.

It answers nobody then, and nothing is lost: once there is room it goes on where it was. Whoever
waits for an answer meanwhile is told, instead of waiting for ever.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from ratoon.errors import OutOfDisk
from ratoon.units import format_mib

#: What QEMU tells of, see its QMP reference.
EVENTS = ("BLOCK_IO_ERROR", "STOP", "RESUME")
_FILE_TOO_LARGE = os.strerror(errno.EFBIG)


class Standstill:
    """Whether the guest `name` stands still, why, and who must be told.

    `directory` is where its disk's file is, `file_limit` how long that may get.
    """

    def __init__(self, name: str, directory: Path, stopped: Callable[[], object]) -> None:
        """`stopped` is called when it stops unasked: it finds out why, and begins this if need be.

        Of an event alone it cannot be told: a guest that will never go on stops in the same way.
        """
        self.file_limit: int | None = None
        self._name = name
        self._directory = directory
        self._stopped = stopped
        self._error: Mapping[str, Any] = {}
        self._pausing = False
        self._still = False
        self._blocks: set[asyncio.Timeout] = set()

    def hear(self, event: Mapping[str, Any]) -> bool:
        """Take notice of an event as it arrives; False: it need not be kept."""
        match event["event"]:
            case "BLOCK_IO_ERROR":
                # Newer versions of QEMU hold back errors that follow each other closely, but no
                # stops: the last one known may be an earlier one of the same kind.
                self._error = event["data"]
            case "STOP" if not self._pausing:
                self._stopped()
            case "RESUME":
                self._still = False
        return False

    def begin(self) -> None:
        """It stands still from now on: blocks that wait for it are interrupted."""
        self._still = True
        blocks, self._blocks = self._blocks, set()
        for block in blocks:
            block.reschedule(asyncio.get_running_loop().time())

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """A stop in the block is on request."""
        self._pausing = True
        try:
            yield
        finally:
            self._pausing = False

    @asynccontextmanager
    async def interrupts(self) -> AsyncIterator[None]:
        """Raise OutOfDisk in the block when the guest stands still, or does so already."""
        if self._still:
            raise OutOfDisk(self._explain())
        try:
            # It never comes by itself: `begin` brings it forward.
            async with asyncio.timeout(None) as block:
                self._blocks.add(block)
                try:
                    yield
                finally:
                    self._blocks.discard(block)
        except TimeoutError:
            if not block.expired():
                raise
            raise OutOfDisk(self._explain()) from None

    def _explain(self) -> str:
        what = f"{self._name} stands still: "
        if self._error.get("nospace"):
            return f"{what}no space left for {self._directory}; make room, then resume it"
        reason = self._error.get("reason", "QEMU did not say why")
        if self.file_limit is not None and reason == _FILE_TOO_LARGE:
            return (
                f"{what}its disk has reached its limit of {format_mib(self.file_limit)}; "
                "branch it, which begins a new disk, or fork one with a higher limit"
            )
        return f"{what}its disk failed: {reason}"
