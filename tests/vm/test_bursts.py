"""Many forks at once: one image for all, and one failure costs one fork."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from vm_helpers import leaves_nothing, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import InvalidInput, MachineError
from ratoon.machine.vmm.driver import Launch
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.memory import image as image_module


def mapped_inodes(pid: int) -> set[int]:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {int(line.split()[4]) for line in maps if "/memory" in line}


async def test_a_burst_shares_one_image(engine: Engine, sandbox: Sandbox) -> None:
    await sh(sandbox, "echo from the source >/dev/shm/note")
    await engine.branch(sandbox, "crowd")
    engine.evict_image("crowd")
    with leaves_nothing(engine):
        forks = await engine.fork("crowd", 5)
        assert len({fork.id for fork in forks if isinstance(fork, Sandbox)}) == 5
        inodes: set[int] = set()
        for fork in forks:
            assert isinstance(fork, Sandbox)
            assert await sh(fork, "hostname; cat /dev/shm/note") == f"{fork.id}\nfrom the source\n"
            inodes |= mapped_inodes(fork.pid)
            assert engine.get(fork.id) is fork
        assert len(inodes) == 1
        await asyncio.gather(*(fork.kill() for fork in forks if isinstance(fork, Sandbox)))


async def test_fifty_forks_of_a_cold_head_make_one_image(
    engine: Engine, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.branch(sandbox, "cold")
    engine.evict_image("cold")
    written: list[Path] = []
    write = image_module._write_image

    def counted(path: Path, *rest: Any) -> None:
        written.append(path)
        write(path, *rest)

    monkeypatch.setattr(image_module, "_write_image", counted)
    forks = await engine.fork("cold", 50)
    assert [fork for fork in forks if not isinstance(fork, Sandbox)] == []
    assert len(written) == 1
    assert len({fork.memory.inode for fork in forks if isinstance(fork, Sandbox)}) == 1
    await asyncio.gather(*(fork.kill() for fork in forks if isinstance(fork, Sandbox)))


async def test_one_machine_killed_costs_one_fork(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = QemuMachine.start
    started: list[int] = []

    async def start_and_kill_the_third(launch: Launch) -> QemuMachine:
        machine = await start(launch)
        started.append(machine.pid)
        if len(started) == 3:
            os.kill(machine.pid, signal.SIGKILL)
        return machine

    monkeypatch.setattr(QemuMachine, "start", start_and_kill_the_third)
    with leaves_nothing(engine):
        outcomes = await engine.fork("base", 5)
        forks = [outcome for outcome in outcomes if isinstance(outcome, Sandbox)]
        (failure,) = (outcome for outcome in outcomes if not isinstance(outcome, Sandbox))
        assert isinstance(failure, MachineError)
        assert "died" in str(failure)
        assert str(started[2]) in str(failure)
        assert {path.name for path in engine.store.sandboxes.iterdir()} >= {f.id for f in forks}
        for fork in forks:
            assert await sh(fork, "echo alive") == "alive\n"
            await fork.kill()


async def test_cancelling_a_burst_leaves_nothing(engine: Engine) -> None:
    with leaves_nothing(engine):
        burst = asyncio.create_task(engine.fork("base", 5))
        while len(engine.sandboxes) < 2:
            await asyncio.sleep(0)
        burst.cancel()
        with pytest.raises(asyncio.CancelledError):
            await burst


async def test_a_burst_of_none(engine: Engine) -> None:
    with pytest.raises(InvalidInput):
        await engine.fork("base", 0)
