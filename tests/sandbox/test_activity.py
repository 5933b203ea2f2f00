"""What counts as being at work, by figures that were measured of guests."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from typing import Any, cast

import pytest

from ratoon.engine.sandbox import activity as module
from ratoon.engine.sandbox.activity import PROCESSOR, PROCESSOR_AT_ONCE, Activity, Allowance
from ratoon.errors import GuestError, MachineDied
from ratoon.machine.vmm.driver import PACKETS_WRAP

LOOK = 0.5


def ever_used_up(milliseconds: Iterable[float], within: float = 60) -> bool:
    """Whether a guest that takes so much between looks has ever used up what it may."""
    allowance = Allowance(PROCESSOR, PROCESSOR_AT_ONCE)
    used = now = 0.0
    allowance.is_used_up(used, now, within)
    for each in milliseconds:
        used, now = used + each / 1000, now + LOOK
        if allowance.is_used_up(used, now, within):
            return True
    return False


def test_guests_that_wait_and_guests_that_work() -> None:
    """Under emulation, on a loaded host; bursts are of the kernel's own work."""
    waiting = [2.4, 2.4, 28.7, 2.4, 3.7, 18.7] + [3.0] * 20
    server = [9.3, 11.4, 9.3, 56.3, 38.7, 9.3, 28.5] + [9.3] * 20
    assert not ever_used_up(islice(cycle(waiting), 10_000))
    assert not ever_used_up(islice(cycle(server), 10_000))
    assert ever_used_up([50.0] * 20), "ten programs a second"
    assert ever_used_up([250.0] * 3)


def test_in_a_short_time_less_is_enough() -> None:
    assert not ever_used_up([60.0] * 4)
    assert ever_used_up([60.0] * 4, within=1)
    assert not ever_used_up([3.0] * 100, within=1)


def test_what_was_used_up_is_so_for_as_long_as_it_is_used() -> None:
    allowance = Allowance(PROCESSOR, PROCESSOR_AT_ONCE)
    answers = [allowance.is_used_up(float(min(now, 10)), now, 60) for now in range(15)]
    assert answers == [False, *[True] * 10, *[False] * 4]


class Machine:
    """`pid` is a process that burns; `counted` what its card has counted by each look."""

    def __init__(self, pid: int = 0, counted: Iterable[int] = ()) -> None:
        self.pid = pid
        self._counted: Iterator[int] = iter(counted)

    async def packets(self) -> int:
        for count in self._counted:
            return count % PACKETS_WRAP
        raise MachineDied("it is gone")


@pytest.fixture
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a look later each time it is read."""
    ticks = (n * LOOK for n in range(100_000))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(module, "_processor_seconds", lambda pid: 0.0)


async def goes_on(counted: Iterable[int], *, online: bool = True) -> list[bool]:
    activity = Activity(cast(Any, Machine(counted=counted)), cast(Any, None))
    return [await activity.uses_something(60, online=online) for _ in range(100)]


@pytest.mark.usefixtures("_now")
async def test_packets_count_and_a_few_do_not() -> None:
    assert any(await goes_on(range(0, 10**6, 50)))
    assert any(await goes_on(range(PACKETS_WRAP - 60, 10**6, 50))), "its counter begins anew"
    assert not any(await goes_on(range(0, 100, 2))), "of somebody who asks for the time"
    assert not any(await goes_on(range(0, 10**6, 50), online=False))
    assert not any(await goes_on([])), "a machine that is gone"


async def test_processor_time_is_that_of_all_threads() -> None:
    activity = Activity(cast(Any, Machine(os.getpid())), cast(Any, None))
    over = threading.Event()

    def burn() -> None:
        while not over.is_set():
            pass

    thread = threading.Thread(target=burn)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not await activity.uses_something(60, online=False):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    finally:
        over.set()
        thread.join()
    gone = Activity(cast(Any, Machine(2**22 - 1)), cast(Any, None))
    assert not await gone.uses_something(60, online=False)


class Agent:
    def __init__(self, *answers: Any) -> None:
        self._answers = iter(answers)

    async def request(self, op: str, **fields: Any) -> dict[str, Any]:
        answer = next(self._answers)
        if isinstance(answer, GuestError):
            raise answer
        if answer is None:
            await asyncio.Event().wait()
        return {"processes": answer}


def process(exit_code: int | None) -> dict[str, Any]:
    return {
        **{"pid": 1, "argv": [], "user": "root", "started_at": 1.0, "background": True},
        **{"terminal": False, "attached": False, "exit_code": exit_code},
    }


async def test_commands_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEISURE", 0.01)
    answers: tuple[Any, ...] = (
        [process(0)],
        [process(0), process(None)],
        None,
        GuestError("it is lost"),
        [],
    )
    activity = Activity(cast(Any, None), cast(Any, Agent(*answers)))
    found = []
    for _ in answers:
        await asyncio.sleep(0.05)
        found.append(await activity.runs_commands(60))
    assert found == [False, True, True, False, False]
