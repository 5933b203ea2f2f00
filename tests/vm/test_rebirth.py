"""Rebirth: a fork is an individual, in the present, before anything in it runs."""

from __future__ import annotations

import asyncio

import pytest
from vm_helpers import CLOCK_TOLERANCE, assert_in_the_present, sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import GuestTimeout
from ratoon.machine.guest.channel import Channel

IDENTITY = """
cat /proc/sys/kernel/random/uuid /etc/machine-id /run/ratoon/instance-id
python3 -c 'import os, ssl; print(os.urandom(16).hex()); print(ssl.RAND_bytes(16).hex())'
"""


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


#: Notes the time and who it is, as fast as it can be read.
WATCH = """
import os, time
def read(path):
    with open(path, "rb", buffering=0) as file:
        return file.read(64).strip().decode()
while True:
    names = read("/proc/sys/kernel/hostname"), read("/etc/machine-id")
    uuid = read("/proc/sys/kernel/random/uuid")
    os.write(1, f"{time.monotonic_ns()} {names[0]} {names[1]} {uuid}\\n".encode())
"""


async def notes(sandbox: Sandbox) -> tuple[int, list[list[str]]]:
    """How many notes are of before the fork, and those written after it, words apart."""
    own = [sandbox.id, (await sh(sandbox, "cat /etc/machine-id")).strip()]
    await sh(sandbox, f"until grep -q '{own[0]} {own[1]}' /dev/shm/notes; do sleep 0.05; done")
    lines = (await sh(sandbox, "head -n -1 /dev/shm/notes")).splitlines()
    words = [line.split(" ") for line in lines]
    times = [int(line[0]) for line in words]
    assert times == sorted(times), "the monotonic clock went back"
    first = [line[1:3] for line in words].index(own)
    assert all(line[1:3] == own for line in words[first:])
    # One note may have been under way: its parts are of either side.
    old = words[first - 2][1:3]
    assert own[0] not in old
    assert own[1] not in old
    assert all(line[1:3] == old for line in words[: first - 1])
    return first, words[first + 1 :]


async def test_nothing_runs_in_a_fork_before_it_is_reborn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slowly(
        channel: Channel, name: str, machine_id: str, kind: int, *, timeout: float
    ) -> None:
        await asyncio.sleep(1)
        await rebirth(channel, name, machine_id, kind, timeout=timeout)

    async with await engine.fork_one("base") as source:
        await sh(source, f"setsid python3 -c '{WATCH}' >/dev/shm/notes 2>&1 &")
        await sh(source, "until [ $(wc -l </dev/shm/notes) -gt 100 ]; do sleep 0.05; done")
        await engine.branch(source, "watched")
        noted = int(await sh(source, "wc -l </dev/shm/notes"))
        await sh(source, f"until [ $(wc -l </dev/shm/notes) -gt {noted} ]; do sleep 0.05; done")

    found = []
    rebirth = Channel.rebirth
    async with await engine.fork_one("watched") as quick:
        monkeypatch.setattr(Channel, "rebirth", slowly)
        async with await engine.fork_one("watched") as slow:
            found = [await notes(fork) for fork in (quick, slow)]
    # Both have as many notes of the source's as the snapshot had, to the line.
    assert found[0][0] == found[1][0] <= noted + 1
    uuids = [{line[3] for line in lines} for _, lines in found]
    assert not uuids[0] & uuids[1]


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
