"""Whoever waits for a guest that stands still hears so, and only they."""

from __future__ import annotations

import asyncio

import pytest

from ratoon.errors import OutOfDisk
from ratoon.vmm.standstill import Standstill


async def waiting(standstill: Standstill, seconds: float = 60) -> str:
    async with standstill.interrupts():
        await asyncio.sleep(seconds)
        return "answered"


async def started(count: int, standstill: Standstill) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(waiting(standstill)) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


async def test_all_who_wait_are_told_why() -> None:
    standstill = Standstill()
    tasks = await started(3, standstill)
    standstill.begin("no room")
    for task in tasks:
        with pytest.raises(OutOfDisk, match="no room"):
            await task


async def test_who_comes_later_is_told_at_once_until_it_goes_on() -> None:
    standstill = Standstill()
    standstill.begin("no room")
    for _ in range(2):
        with pytest.raises(OutOfDisk, match="no room"):
            await waiting(standstill)
    standstill.end()
    assert await waiting(standstill, 0) == "answered"


async def test_it_may_stand_still_again_and_be_said_twice() -> None:
    standstill = Standstill()
    (first,) = await started(1, standstill)
    standstill.begin("no room")
    standstill.begin("no room")
    standstill.end()
    (second,) = await started(1, standstill)
    with pytest.raises(OutOfDisk, match="no room"):
        await first
    assert not second.done()
    standstill.begin("none again")
    with pytest.raises(OutOfDisk, match="none again"):
        await second


async def test_who_is_cancelled_is_cancelled() -> None:
    standstill = Standstill()
    (task,) = await started(1, standstill)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    standstill.begin("no room")  # nobody is left to be told


async def test_a_timeout_inside_remains_one() -> None:
    with pytest.raises(TimeoutError):
        async with Standstill().interrupts(), asyncio.timeout(0):
            await asyncio.sleep(60)
