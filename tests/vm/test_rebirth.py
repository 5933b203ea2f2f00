"""Rebirth: a fork is an individual, in the present, before anything in it runs."""

from __future__ import annotations

import asyncio
import time

import pytest
from vm_helpers import sh

from ratoon.errors import GuestTimeout
from ratoon.guest.channel import Channel
from ratoon.sandbox.engine import Engine
from ratoon.sandbox.sandbox import Sandbox

#: Seconds that guest and host may differ by: a command's start, under emulation, on a busy host.
CLOCK_TOLERANCE = 1.5

IDENTITY = """
cat /proc/sys/kernel/random/uuid /etc/machine-id /run/ratoon/instance-id
python3 -c 'import os, ssl; print(os.urandom(16).hex()); print(ssl.RAND_bytes(16).hex())'
"""


async def assert_in_the_present(sandbox: Sandbox) -> None:
    before = time.time()
    guest = float(await sh(sandbox, "date +%s.%N"))
    assert before - CLOCK_TOLERANCE < guest < time.time() + CLOCK_TOLERANCE


async def test_forks_differ_in_all_that_should_be_unique(engine: Engine, sandbox: Sandbox) -> None:
    await engine.branch(sandbox, "twice")
    async with await engine.fork_one("twice") as one, await engine.fork_one("twice") as two:
        three = [(await sh(each, IDENTITY)).split() for each in (sandbox, one, two)]
        for kind in zip(*three, strict=True):
            assert len(set(kind)) == 3, kind
        for each, identity in zip((sandbox, one, two), three, strict=True):
            machine_id, instance_id = identity[1:3]
            assert len(bytes.fromhex(machine_id)) == 16
            assert instance_id == each.id
            assert await sh(each, "hostname") == f"{each.id}\n"


async def test_forks_of_an_old_snapshot_live_in_the_present(
    engine: Engine, sandbox: Sandbox
) -> None:
    await engine.branch(sandbox, "old")
    await asyncio.sleep(3 * CLOCK_TOLERANCE)
    async with await engine.fork_one("old") as one, await engine.fork_one("old") as two:
        for each in (one, two, sandbox):
            await assert_in_the_present(each)


#: Notes the machine-id as fast as it can be read, in one read each.
WATCH = """
import os
while True:
    with open("/etc/machine-id", "rb", buffering=0) as file:
        os.write(1, file.read(64))
"""


async def test_nothing_runs_in_a_fork_before_it_is_reborn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slowly(
        channel: Channel, name: str, machine_id: str, *, resume: bool = False, timeout: float
    ) -> None:
        await asyncio.sleep(1)
        await rebirth(channel, name, machine_id, resume=resume, timeout=timeout)

    async with await engine.fork_one("base") as source:
        await sh(source, f"setsid python3 -c '{WATCH}' >/dev/shm/ids 2>&1 & sleep 0.5")
        source_id = (await sh(source, "cat /etc/machine-id")).strip()
        await engine.branch(source, "watched")
        noted = await sh(source, "wc -l </dev/shm/ids")
        assert int(noted) > 100
        await sh(source, f"until [ $(wc -l </dev/shm/ids) -gt {noted.strip()} ]; do :; done")

    counts = []
    rebirth = Channel.rebirth
    async with await engine.fork_one("watched") as quick:
        monkeypatch.setattr(Channel, "rebirth", slowly)
        async with await engine.fork_one("watched") as slow:
            for fork in (quick, slow):
                await sh(fork, "grep -q $(cat /etc/machine-id) /dev/shm/ids || sleep 1")
                ids = (await sh(fork, "uniq -c /dev/shm/ids")).split()
                assert ids[1::2] == [source_id, ids[3]]
                assert ids[3] == (await sh(fork, "cat /etc/machine-id")).strip()
                counts.append(ids[0])
    # Both have noted the source's id as often as the snapshot had, to the line.
    assert counts[0] == counts[1]
    assert int(counts[0]) <= int(noted)


async def test_a_guest_that_does_not_freeze_is_branched_with_a_warning(
    engine: Engine, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await engine.branch(sandbox, "quiet")).snapshot.manifest.warning is None
    ask = Channel.request

    async def deaf(channel: Channel, op: str, *, timeout: float, **fields: object) -> object:
        if op == "freeze":
            raise GuestTimeout("it is deaf")
        return await ask(channel, op, timeout=timeout, **fields)

    monkeypatch.setattr(Channel, "request", deaf)
    await engine.branch(sandbox, "running")
    warning = engine.store.get("running").manifest.warning
    assert warning is not None
    assert "it is deaf" in warning
    async with await engine.fork_one("running") as fork:
        assert await sh(fork, "echo alive") == "alive\n"
