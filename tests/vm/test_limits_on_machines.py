"""Limits on real machines: they hold, whoever waits is told, and what can go on does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from vm_helpers import FOR_EVER, MIB, leaves_nothing, sh, until

from ratoon.errors import MachineDied, OutOfDisk
from ratoon.host.cgroups import Cgroup, Cgroups, remove
from ratoon.host.hierarchies import hierarchies
from ratoon.host.limits import Limits
from ratoon.sandbox.engine import Engine
from ratoon.sandbox.sandbox import Sandbox


@contextmanager
def groups_of(sandbox: Sandbox, limits: Limits) -> Iterator[Cgroup]:
    directory = sandbox.directory.path
    cgroup = Cgroups("tests", hierarchies()).create(directory, limits)
    assert cgroup is not None
    try:
        yield cgroup
    finally:
        remove(directory)


async def test_one_that_takes_too_much_memory_dies_and_says_so(
    engine: Engine, sandbox: Sandbox
) -> None:
    with leaves_nothing(engine):
        async with await engine.fork_one("base") as greedy:
            with groups_of(greedy, Limits(memory_bytes=128 * MIB)) as cgroup:
                await greedy.machine.confine(cgroup, None)
                with pytest.raises(MachineDied) as death:
                    await greedy.exec(["python3", "-c", "x = b'x' * (300 << 20)"], timeout=FOR_EVER)
        assert str(death.value).startswith(
            f"sandbox {greedy.id} died (process {cgroup_pid(death.value)}): the kernel killed it "
            "at its memory limit of 128.0 MiB; give it a higher one"
        )
        assert await sh(sandbox, "echo unharmed") == "unharmed\n"


def cgroup_pid(death: MachineDied) -> str:
    return str(death).partition("(process ")[2].partition(")")[0]


async def test_one_with_little_processor_time_waits_for_it(engine: Engine) -> None:
    async with await engine.fork_one("base") as slow:
        with groups_of(slow, Limits(cpus=0.05)) as cgroup:
            await slow.machine.confine(cgroup, None)
            (group,) = cgroup.groups
            busy = asyncio.create_task(slow.exec(["sh", "-c", "while :; do :; done"]))
            await until(lambda: group.count("cpu.stat", "nr_throttled") > 2, "its throttling")
            await slow.kill()
            await asyncio.gather(busy, return_exceptions=True)


FILL = "dd if=/dev/urandom of=/root/big bs=1M count=60 && sync"
SOUND = """
cd /root; sha256sum -c sums; echo 3 >/proc/sys/vm/drop_caches; sha256sum -c sums
dmesg | grep -iE 'ext4.*(error|warning)|I/O error' || true
"""


async def test_one_whose_disk_reaches_its_limit_stands_still_and_goes_on(engine: Engine) -> None:
    with leaves_nothing(engine):
        async with await engine.fork_one("base") as full:
            await sh(full, "head -c 5000000 /dev/urandom >/root/own; cd /root; sha256sum own >sums")
            await full.machine.confine(None, 24 * MIB)
            commands = [["sh", "-c", FILL], ["sleep", "1000"]]
            waiting = [asyncio.create_task(full.exec(argv, timeout=1000)) for argv in commands]
            said = f"{full.id} stands still: its disk has reached its limit of 24.0 MiB; give it a"
            for each in waiting:
                with pytest.raises(OutOfDisk, match=said):
                    await asyncio.wait_for(each, FOR_EVER)
            with pytest.raises(OutOfDisk, match=said):
                await full.exec(["true"])

            await full.machine.confine(None, None)
            await full.machine.resume()
            # What was interrupted was cancelled; all else is as it was.
            assert await sh(full, SOUND) == "own: OK\n" * 2
            await sh(full, FILL)
            assert full.incarnation.overlay.stat().st_size > 60 * MIB


async def test_a_branch_of_one_that_stands_still_goes_on(engine: Engine) -> None:
    """Its writes are tried again, and go to the new overlay; in a fork, too."""
    async with await engine.fork_one("base") as full:
        await full.machine.confine(None, 24 * MIB)
        with pytest.raises(OutOfDisk):
            await full.exec(["sh", "-c", FILL], timeout=FOR_EVER)
        await engine.branch(full, "full")
        await full.machine.confine(None, None)
        await full.machine.resume()
        assert await sh(full, "sync; echo whole") == "whole\n"
        async with await engine.fork_one("full") as fork:
            assert await sh(fork, "sync; echo whole") == "whole\n"
            await sh(fork, "! dmesg | grep -iE 'ext4.*(error|warning)|I/O error'")
