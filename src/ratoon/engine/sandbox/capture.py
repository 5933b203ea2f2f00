"""Taking the state out of a machine, while it stands still for as short as can be.

Paused, only what cannot wait is done: device state, the list of changed pages, and their copy.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ratoon.engine.sandbox.incarnation import SYNC_SECONDS, Incarnation, Stillness, unsynced
from ratoon.engine.sandbox.stages import Stages
from ratoon.errors import GuestError
from ratoon.store.memory.dirty import dirty_pages
from ratoon.store.memory.process import PageBuffer, read_into

log = logging.getLogger(__name__)

#: Seconds the guest may take to stop its processes before it is captured all the same.
FREEZE_TIMEOUT = 2.0
#: Pages of room that are kept for who borrows next: 256 MiB.
KEPT_PAGES = 64 * 1024
#: Pages that may become dirty between the first look and the pause without costing it faults.
SPARE_PAGES = 1024


@dataclass(frozen=True)
class Capture:
    """What was taken from a paused machine; `pages` (n, 4096) lie in a borrowed buffer."""

    state: bytes
    numbers: NDArray[np.uint64]
    pages: NDArray[np.uint8]


class Buffers:
    """Page buffers to borrow; those that have grown are worth keeping, within bounds."""

    def __init__(self, kept_pages: int = KEPT_PAGES) -> None:
        self._kept_pages = kept_pages
        self._free: list[PageBuffer] = []

    @contextmanager
    def borrow(self) -> Iterator[PageBuffer]:
        buffer = self._free.pop() if self._free else PageBuffer()
        try:
            yield buffer
        finally:
            kept = sum(len(each) for each in self._free)
            if kept + len(buffer) <= self._kept_pages:
                self._free.append(buffer)


async def reserve(run: Incarnation, buffer: PageBuffer) -> None:
    """Touch room for the pages before the pause: that costs more than their copy."""
    pid, ram = run.machine.pid, run.memory
    expected = await asyncio.to_thread(dirty_pages, pid, ram.address_in(pid), ram.length)
    await asyncio.to_thread(buffer.reserve, len(expected) + SPARE_PAGES)


async def capture(run: Incarnation, buffer: PageBuffer, stages: Stages) -> Capture:
    """What makes the snapshot of a paused machine, but for its disk."""
    pid, ram = run.machine.pid, run.memory
    address = ram.address_in(pid)
    with stages("state"):
        state = await run.machine.save_state()
    with stages("scan"):
        numbers = await asyncio.to_thread(dirty_pages, pid, address, ram.length)
    with stages("copy"):
        pages = buffer.view(len(numbers))
        await asyncio.to_thread(read_into, pid, address, numbers, pages)
    return Capture(state, numbers, pages)


async def capture_last(
    run: Incarnation, buffer: PageBuffer, stages: Stages
) -> tuple[Capture, Stillness]:
    """As `capture`, of a guest that runs and shall not go on; its overlay is part of it."""
    with stages("quiesce"):
        still = await freeze(run)
    with stages("pause"):
        await run.machine.pause()
    return await capture(run, buffer, stages), still


async def freeze(run: Incarnation) -> Stillness:
    """Stop the sandbox's processes, so that none runs in a fork before it is reborn.

    What they have written to volumes is with the host then.
    """
    try:
        reply = await run.channel.request(
            "freeze",
            timeout=SYNC_SECONDS if run.writes_volumes else FREEZE_TIMEOUT + 1,
            seconds=FREEZE_TIMEOUT,
            sync_seconds=SYNC_SECONDS - FREEZE_TIMEOUT,
        )
    except GuestError as error:
        run.still = Stillness(str(error), str(error) if run.writes_volumes else None)
    else:
        stopped = reply.get("frozen") is True
        problem = None if stopped else f"they did not stop within {FREEZE_TIMEOUT:g} s"
        run.still = Stillness(problem, unsynced(reply))
    return run.still


async def thaw(name: str, run: Incarnation) -> None:
    """Let the processes of sandbox `name` go on."""
    run.still = None
    try:
        await run.channel.request("thaw", timeout=FREEZE_TIMEOUT + 1, unix_ns=time.time_ns())
    except GuestError as error:  # nothing is lost: the next branch or rebirth thaws as well
        log.warning("sandbox %s: %s", name, error)
