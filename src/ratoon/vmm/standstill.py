"""A guest that stands still though nobody paused it: its disk cannot take what it writes.

It answers nobody then, and nothing is lost: once there is room it goes on where it was. Whoever
waits for an answer meanwhile is told, instead of waiting for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ratoon.errors import OutOfDisk


class Standstill:
    """Whether a guest stands still, why, and who must be told."""

    def __init__(self) -> None:
        self._reason = ""
        self._still = False
        self._blocks: set[asyncio.Timeout] = set()

    def begin(self, reason: str) -> None:
        """From now on it stands still; blocks that wait for it are interrupted."""
        self._reason, self._still = reason, True
        blocks, self._blocks = self._blocks, set()
        for block in blocks:
            block.reschedule(asyncio.get_running_loop().time())

    def end(self) -> None:
        """It runs again."""
        self._still = False

    @asynccontextmanager
    async def interrupts(self) -> AsyncIterator[None]:
        """Raise OutOfDisk in the block when the guest stands still, or does so already."""
        if self._still:
            raise OutOfDisk(self._reason)
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
            raise OutOfDisk(self._reason) from None
