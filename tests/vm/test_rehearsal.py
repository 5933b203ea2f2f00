"""A machine of the pool has rehearsed: a claim does less, and nothing of it is to be seen."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from vm_helpers import sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest import commands
from ratoon.machine.vmm.driver import Machine
from ratoon.machine.vmm.qemu import QemuMachine

#: Until the notes are of who it is now.
NOTED = "until tail -n1 /root/seen | grep -q $(cat /etc/machine-id); do sleep 0.1; done"
#: Notes who it is, all the time, in what survives an abrupt end.
NOTES = "while :; do cat /etc/machine-id; sleep 0.01; done >/root/seen 2>&1 & echo $!"
HOOK = """
mkdir -p /etc/ratoon/rebirth.d
cd /etc/ratoon/rebirth.d
printf '#!/bin/sh\\necho "$RATOON_INSTANCE_ID $RATOON_MACHINE_ID" >>/root/told' >tell
chmod +x tell
"""
#: Programs, but for threads of the kernel, which come and go; and what they might leave.
SEEN = """
for pid in /proc/[0-9]*; do tr '\\0' ' ' <$pid/cmdline 2>/dev/null; done
ls -A /root /tmp /run /sys/fs/cgroup/sandbox; env
"""


@asynccontextmanager
async def claimed(
    engine: Engine, tag: str, options: SandboxOptions | None = None
) -> AsyncIterator[Sandbox]:
    """A fork of `tag` that has come from the pool."""
    await engine.pool.keep(engine.store.get(tag), 1)
    try:
        await engine.pool.filled()
        async with await engine.fork_one(tag, options) as fork:
            assert "start" not in fork.stages
            yield fork
    finally:
        await engine.pool.drop(tag)


async def blocks(machine: Machine) -> int:
    """How many QEMU has translated for the guest."""
    assert isinstance(machine, QemuMachine)
    command = {"command-line": "info jit"}
    told = await machine._execute("human-monitor-command", **command)
    found = re.search(r"TB count\s+(\d+)", told)
    assert found, told
    return int(found[1])


async def test_the_first_command_finds_most_of_it_translated(engine: Engine) -> None:
    async with await engine.fork_one("base") as plain:
        await sh(plain, "true")
        whole = await blocks(plain.machine)
    await engine.pool.keep(engine.store.get("base"), 1)
    try:
        await engine.pool.filled()
        (stock,) = engine.pool._stocks.values()
        waiting = stock.ready[0].prepared.machine
        before = await blocks(waiting)
        async with await engine.fork_one("base") as fork:
            assert fork.machine is waiting
            await sh(fork, "true")
            assert await blocks(waiting) - before < whole / 4
    finally:
        await engine.pool.drop("base")


async def test_what_the_snapshot_runs_stands_still_meanwhile(engine: Engine) -> None:
    """So a hook is done before any of it goes on, and once."""
    async with await engine.fork_one("base") as maker:
        await sh(maker, HOOK)
        pid = (await sh(maker, NOTES)).strip()
        await sh(maker, NOTED)
        while (await engine.branch(maker, "notes")).snapshot.manifest.warning:
            await engine.delete("notes")  # it did not stand still in time, on a busy host
        ids = {(await sh(maker, "cat /etc/machine-id")).strip()}
    async with claimed(engine, "notes") as fork:
        ids.add((await sh(fork, "cat /etc/machine-id")).strip())
        await sh(
            fork,
            f"{NOTED}; kill {pid}",
        )
        assert {*(await sh(fork, "cat /root/seen")).split()} == ids
        told = (await sh(fork, "cat /root/told")).splitlines()
        assert told[-1].split()[0] == fork.id
        assert {line.split()[1] for line in told} < ids
        assert len(told) == 1
    await engine.delete("notes")


async def test_nothing_of_it_is_to_be_seen(engine: Engine) -> None:
    async with await engine.fork_one("base") as plain:
        expected = await sh(plain, SEEN)
    async with claimed(engine, "base") as fork:
        assert await commands.processes(fork) == []
        assert await sh(fork, SEEN) == expected


async def test_volumes_are_there_all_the_same(engine: Engine, tmp_path: Path) -> None:
    """Where they are mounted already, a machine does not rehearse: nobody answers for them."""
    (tmp_path / "file").write_text("there")
    volumes = SandboxOptions(volumes=(Volume(source=str(tmp_path), target="/mnt"),))
    async with claimed(engine, "base", volumes) as maker:
        assert await sh(maker, "cat /mnt/file") == "there"
        await engine.branch(maker, "mounted")
    async with claimed(engine, "mounted", volumes) as fork:
        assert await sh(fork, "cat /mnt/file") == "there"
    await engine.delete("mounted")
