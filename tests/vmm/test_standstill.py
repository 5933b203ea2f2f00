"""Whoever waits for a guest that stands still hears so, and only they."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from ratoon.errors import OutOfDisk
from ratoon.machine.vmm.standstill import Standstill

STOP = {"event": "STOP"}
RESUME = {"event": "RESUME"}


def io_error(reason: str, *, nospace: bool = False) -> dict[str, Any]:
    return {"event": "BLOCK_IO_ERROR", "data": {"nospace": nospace, "reason": reason}}


@pytest.fixture
def standstill() -> Standstill:
    """Of a machine that stops for no other reason than its disk."""

    made = Standstill("sb-1", Path("/sandboxes/sb-1"), lambda: made.begin())  # noqa: PLW0108 - it is not made yet
    return made


async def waiting(standstill: Standstill, seconds: float = 60) -> str:
    async with standstill.interrupts():
        await asyncio.sleep(seconds)
        return "answered"


async def started(count: int, standstill: Standstill) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(waiting(standstill)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


@pytest.mark.parametrize(
    ("limit", "event", "said"),
    [
        (
            64 << 20,
            io_error(os.strerror(27)),
            r"its limit of 64\.0 MiB; branch it, which begins",
        ),
        (None, io_error(os.strerror(27)), "its disk failed: File too large"),
        (1, io_error("No space", nospace=True), "no space left for /sandboxes/sb-1; make room"),
        (1, io_error("Input/output error"), "its disk failed: Input/output error"),
        (1, RESUME, "its disk failed: QEMU did not say why"),
    ],
)
async def test_all_who_wait_are_told_why(
    standstill: Standstill, limit: int | None, event: dict[str, Any], said: str
) -> None:
    standstill.file_limit = limit
    tasks = await started(3, standstill)
    assert not standstill.hear(event)
    assert not standstill.hear(STOP)
    for task in tasks:
        with pytest.raises(OutOfDisk, match=f"sb-1 stands still: .*{said}"):
            await task


async def test_a_stop_on_request_interrupts_nobody(standstill: Standstill) -> None:
    (task,) = await started(1, standstill)
    with standstill.pausing():
        standstill.hear(STOP)
    await asyncio.sleep(0)
    assert not task.done()
    task.cancel()


async def test_a_stop_unasked_is_looked_into_first() -> None:
    """A guest that has ended stops in the same way: whoever waits for it is not to make room."""
    stops: list[None] = []
    standstill = Standstill("sb-1", Path("/sandboxes/sb-1"), lambda: stops.append(None))
    (task,) = await started(1, standstill)
    with standstill.pausing():
        standstill.hear(STOP)
    assert not stops
    standstill.hear(STOP)
    await asyncio.sleep(0)
    assert len(stops) == 1
    assert not task.done()
    task.cancel()


async def test_who_comes_later_is_told_at_once_until_it_goes_on(standstill: Standstill) -> None:
    standstill.hear(STOP)
    for _ in range(2):
        with pytest.raises(OutOfDisk):
            await waiting(standstill)
    standstill.hear(RESUME)
    assert await waiting(standstill, 0) == "answered"


async def test_it_may_stand_still_again_and_be_said_twice(standstill: Standstill) -> None:
    (first,) = await started(1, standstill)
    for event in (io_error("one"), STOP, io_error("another"), STOP, RESUME):
        standstill.hear(event)
    (second,) = await started(1, standstill)
    with pytest.raises(OutOfDisk):
        await first
    assert not second.done()
    standstill.hear(STOP)  # QEMU may hold back the error itself
    with pytest.raises(OutOfDisk, match="another"):
        await second


async def test_who_is_cancelled_is_cancelled(standstill: Standstill) -> None:
    (task,) = await started(1, standstill)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    standstill.begin()  # nobody is left to be told


async def test_a_timeout_inside_remains_one(standstill: Standstill) -> None:
    with pytest.raises(TimeoutError):
        async with standstill.interrupts(), asyncio.timeout(0):
            await asyncio.sleep(60)
