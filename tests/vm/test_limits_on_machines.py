"""Limits on real machines: they hold, whoever waits is told, and what can go on does."""

from __future__ import annotations

import asyncio

import pytest
from vm_helpers import FOR_EVER, leaves_nothing, sh, until

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import MachineDied, OutOfDisk, Overloaded
from ratoon.machine.host import cgroups
from ratoon.machine.host.limits import Limits
from ratoon.units import MIB


async def limited(engine: Engine, **limits: float) -> Sandbox:
    options = SandboxOptions(limits=Limits.model_validate(limits))
    return await engine.fork_one("base", options)


async def test_one_that_takes_too_much_memory_dies_and_says_so(
    engine: Engine, sandbox: Sandbox
) -> None:
    with leaves_nothing(engine):
        async with await limited(engine, memory_bytes=128 * MIB) as greedy:
            said = (
                rf"sandbox {greedy.id} died \(process {greedy.pid}\): the kernel killed it at its "
                r"memory limit of 128\.0 MiB; give it a higher one"
            )
            with pytest.raises(MachineDied, match=said):
                await greedy.exec(["python3", "-c", "x = b'x' * (300 << 20)"], timeout=FOR_EVER)
        assert await sh(sandbox, "echo unharmed") == "unharmed\n"


async def test_one_with_little_processor_time_waits_for_it(engine: Engine) -> None:
    async with await limited(engine, cpus=0.3) as slow:
        cgroup = cgroups.find(slow.directory.path, slow.options.limits)
        assert cgroup is not None
        (group,) = cgroup.groups
        busy = asyncio.create_task(slow.exec(["sh", "-c", "while :; do :; done"]))
        before = group.count("cpu.stat", "nr_throttled")
        await until(lambda: group.count("cpu.stat", "nr_throttled") > before + 2, "its throttling")
        await slow.kill()
        await asyncio.gather(busy, return_exceptions=True)
        assert not group.directory.exists()


async def test_what_the_host_has_no_room_for_is_refused_and_harms_nobody(
    engine: Engine, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leaves_nothing(engine):
        monkeypatch.setenv("RATOON_MEMORY_RESERVE", "1000T")
        with pytest.raises(
            Overloaded, match=r"^3 forks need about 144 MiB of memory; .* in reserve"
        ):
            await engine.fork("base", 3)
        with pytest.raises(Overloaded, match=r"^1 fork needs about 48 MiB"):
            await engine.fork_one("base")
        assert await sh(sandbox, "echo unharmed") == "unharmed\n"
        monkeypatch.delenv("RATOON_MEMORY_RESERVE")
        async with await engine.fork_one("base") as fork:
            assert await sh(fork, "echo started") == "started\n"


#: More than fits, and no more than fits into two disks.
FILL = "dd if=/dev/urandom of=/root/big bs=1M count=33 && sync"
SOUND = """
cd /root; sha256sum -c sums; echo 3 >/proc/sys/vm/drop_caches; sha256sum -c sums
dmesg | grep -iE 'ext4.*(error|warning)|I/O error' || true
"""


async def test_one_whose_disk_reaches_its_limit_stands_still_and_goes_on(engine: Engine) -> None:
    with leaves_nothing(engine):
        async with await limited(engine, disk_bytes=24 * MIB) as full:
            await sh(full, "head -c 5000000 /dev/urandom >/root/own; cd /root; sha256sum own >sums")
            commands = [["sh", "-c", FILL], ["sleep", "1000"]]
            waiting = [asyncio.create_task(full.exec(argv, timeout=1000)) for argv in commands]
            said = f"{full.id} stands still: its disk has reached its limit of 24.0 MiB; branch"
            for each in waiting:
                with pytest.raises(OutOfDisk, match=said):
                    await asyncio.wait_for(each, FOR_EVER)
            with pytest.raises(OutOfDisk, match=said):
                await full.exec(["true"])

            await engine.branch(full, "full")
            # What was interrupted was cancelled; all else is as it was.
            assert await sh(full, SOUND) == "own: OK\n" * 2
            await sh(full, "sync; echo >/root/more; sync")
        await engine.delete("full")


async def test_a_branch_of_one_that_stands_still_goes_on(engine: Engine) -> None:
    """Its writes are tried again, and go to the new overlay; in a fork, too."""
    async with await limited(engine, disk_bytes=24 * MIB) as full:
        with pytest.raises(OutOfDisk):
            await full.exec(["sh", "-c", FILL], timeout=FOR_EVER)
        await engine.branch(full, "full")
        assert await sh(full, "sync; echo whole") == "whole\n"
        async with await engine.fork_one("full") as fork:
            assert await sh(fork, "sync; echo whole") == "whole\n"
            await sh(fork, "! dmesg | grep -iE 'ext4.*(error|warning)|I/O error'")
