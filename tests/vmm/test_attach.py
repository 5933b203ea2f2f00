"""A QEMU that outlives who started it, and is found again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ratoon.errors import MachineDied, MachineError
from ratoon.machine.vmm.cpu import EMULATED
from ratoon.machine.vmm.driver import Hardware, Launch
from ratoon.machine.vmm.process import MachineProcess, started_at
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.disk.qcow2 import OverlayTemplates

RAM = 16 * 1024 * 1024
DISK = 1024 * 1024

OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
from test_attach import launch_in
from ratoon.machine.vmm.qemu import QemuMachine

async def main():
    machine = await QemuMachine.start(launch_in(Path(sys.argv[1]), survives=sys.argv[2] == "yes"))
    print(machine.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def launch_in(place: Path, *, survives: bool) -> Launch:
    memory = place / "memory"
    memory.touch(0o444)
    os.truncate(memory, RAM)
    templates = OverlayTemplates(place)
    for name in ("base", "disk", "disk-1", "disk-2"):
        templates.create(place / f"{name}.qcow2", DISK)
    return Launch(
        name="sb-test",
        hardware=Hardware(RAM, 1, "tcg", EMULATED),
        memory=memory,
        disks=(place / "base.qcow2",),
        overlay=place / "disk.qcow2",
        log=place / "log",
        runtime=place / "run",
        survives=survives,
    )


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a path short enough for sockets."""
    return tmp_path_factory.mktemp("a")


async def abandoned(place: Path, survives: str) -> int:
    """The process of a machine whose owner was killed."""
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, str(place), survives),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    output, _ = await owner.communicate()
    assert owner.returncode == -signal.SIGKILL
    return int(output)


def overlays(place: Path) -> list[Path]:
    return [place / name for name in ("disk.qcow2", "disk-1.qcow2", "disk-2.qcow2")]


async def attach(place: Path, pid: int) -> QemuMachine:
    return await QemuMachine.attach("sb-test", pid, place / "log", place / "run")


async def test_one_that_survives_is_spoken_to_and_killed(place: Path) -> None:
    machine = await attach(place, await abandoned(place, "yes"))
    assert started_at(machine.pid) > 0
    assert not await machine.is_running()
    assert await machine.active_overlay(overlays(place)) == place / "disk.qcow2"
    assert not machine.has_died
    await machine.kill()
    assert machine.has_died
    with pytest.raises(MachineDied, match="died"):
        await attach(place, machine.pid)


async def test_others_die_with_their_owner(place: Path) -> None:
    pid = await abandoned(place, "no")
    try:
        process = MachineProcess(pid)
    except ProcessLookupError:
        return
    await asyncio.wait_for(process.wait(), 30)


async def test_what_was_let_go_goes_on_where_it_was(place: Path) -> None:
    """The overlay that was switched to is found; the one that was only added is forgotten."""
    machine = await QemuMachine.start(launch_in(place, survives=True))
    await machine.add_overlay(place / "disk-1.qcow2")
    await machine.switch_overlay()
    await machine.add_overlay(place / "disk-2.qcow2")
    await machine.let_go()

    machine = await attach(place, machine.pid)
    try:
        assert await machine.active_overlay(overlays(place)) == place / "disk-1.qcow2"
        await machine.add_overlay(place / "disk-2.qcow2")
        await machine.switch_overlay()
        assert await machine.active_overlay(overlays(place)) == place / "disk-2.qcow2"
    finally:
        await machine.kill()


async def test_a_process_that_nobody_speaks_for(place: Path) -> None:
    (place / "run").mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        with pytest.raises(MachineError, match="failed at attach"):
            await attach(place, other.pid)
        assert other.poll() is None, "it is left as it is"
        other.kill()


async def test_a_process_that_is_no_child_is_noticed_when_it_dies(place: Path) -> None:
    process = MachineProcess(await abandoned(place, "yes"))
    seen: list[int | None] = []
    process.on_death = seen.append
    process.kill()
    process.kill()
    await process.wait()
    assert seen == [None]
    with pytest.raises(ProcessLookupError):
        started_at(process.pid)


def test_no_process_has_not_started() -> None:
    with pytest.raises(ProcessLookupError):
        started_at(2**22 + 1)
