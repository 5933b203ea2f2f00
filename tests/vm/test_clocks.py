"""The guest's clocks: the host's time after a fork, a pause and a while, and never backwards."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import pytest
from vm_helpers import FOR_EVER

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest.evaluation import evaluate
from ratoon.machine.vmm.qemu import QemuMachine

#: Seconds: the time was right when it was sent, and is set when that has arrived.
ROUNDING = 0.05
#: What a clock may gain or lose, as a part of what passes.
DRIFT = 0.01


@dataclass(frozen=True)
class Reading:
    """The guest's clocks, read between two readings of the host's; seconds."""

    before: float
    guest: float
    monotonic: float
    after: float

    def assert_right(self, late_ms: float) -> None:
        """The guest has the host's time, or was told so long ago that it now is."""
        assert self.before - late_ms / 1e3 - ROUNDING < self.guest < self.after + ROUNDING


async def read(sandbox: Sandbox) -> Reading:
    before = time.time()
    result = await evaluate(sandbox, "import time; time.time(), time.monotonic()", timeout=FOR_EVER)
    after = time.time()
    guest, monotonic = (float(word) for word in (result.result or "").strip("()").split(","))
    return Reading(before, guest, monotonic, after)


def assert_no_drift(first: Reading, last: Reading) -> None:
    for then, now in ((first.guest, last.guest), (first.monotonic, last.monotonic)):
        least, most = last.before - first.after, last.after - first.before
        assert least * (1 - DRIFT) < now - then < most * (1 + DRIFT)


async def test_clocks_after_forks_pauses_and_a_while(
    engine: Engine, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = QemuMachine.pause

    async def for_a_second(machine: QemuMachine) -> None:
        await pause(machine)
        await asyncio.sleep(1)

    monkeypatch.setattr(QemuMachine, "pause", for_a_second)
    first = await read(sandbox)
    first.assert_right(sandbox.stages["rebirth"])
    branched = await engine.branch(sandbox, "paused")
    after = await read(sandbox)
    after.assert_right(branched.stages["thaw"])
    assert after.monotonic > first.monotonic
    await asyncio.sleep(2)
    async with await engine.fork_one("paused") as fork:
        forked = await read(fork)
        forked.assert_right(fork.stages["rebirth"])
        assert forked.monotonic > first.monotonic
        await asyncio.sleep(2)
        assert_no_drift(forked, await read(fork))
    assert_no_drift(after, await read(sandbox))
