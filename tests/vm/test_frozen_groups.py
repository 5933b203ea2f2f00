"""Nothing runs in a fork before it is reborn, whatever control group it has moved itself to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from group_loops import CASES, counts, start, until_counting
from vm_helpers import sh

from ratoon.engine.sandbox import capture
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest.channel import Channel


@pytest.fixture
async def source(engine: Engine) -> AsyncIterator[Sandbox]:
    async with await engine.fork_one("base") as sandbox:
        yield sandbox


async def test_nothing_runs_before_rebirth_whatever_group_it_is_in(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has run in a fork before that has counted on under the source's name."""
    delays = [0.0, 0.5, 1.0]
    rebirth = Channel.rebirth

    async def late(
        channel: Channel, name: str, machine_id: str, kind: int, *, timeout: float
    ) -> None:
        await asyncio.sleep(delays.pop())
        await rebirth(channel, name, machine_id, kind, timeout=timeout)

    await start(source, *CASES)
    branched = await engine.branch(source, "counting")
    assert branched.snapshot.manifest.warning is None
    await until_counting(source, *CASES)
    monkeypatch.setattr(Channel, "rebirth", late)
    found: dict[str, list[int]] = {case: [] for case in CASES}
    while delays:
        async with await engine.fork_one("counting") as fork:
            await until_counting(fork, *CASES)
            for case in CASES:
                found[case].append((await counts(fork, case))[source.id])
    run = {case: [count - min(counted) for count in counted] for case, counted in found.items()}
    assert run == {case: [0, 0, 0] for case in CASES}


async def test_what_the_sandbox_has_frozen_stays_so_and_nothing_else(
    engine: Engine, source: Sandbox
) -> None:
    frozen, going = ("nested", "beside"), ("below-beside", "root")
    await start(source, *frozen, *going)
    groups = [CASES[case] for case in frozen]
    await sh(source, "".join(f"echo 1 >{group}/cgroup.freeze;" for group in groups))
    await sh(
        source, "".join(f"until grep -q 'frozen 1' {g}/cgroup.events; do :; done;" for g in groups)
    )
    before = [await counts(source, case) for case in frozen]
    await engine.branch(source, "paused")
    async with await engine.fork_one("paused") as fork:
        for sandbox in (source, fork):
            await until_counting(sandbox, *going)
            assert [await counts(sandbox, case) for case in frozen] == before
            states = "cd /mnt/groups; head -n 1 */cgroup.freeze */*/cgroup.freeze | grep -B 1 1$"
            assert (await sh(sandbox, states)).count("==>") == 2
            await sh(sandbox, "".join(f"echo 0 >{group}/cgroup.freeze;" for group in groups))
            await until_counting(sandbox, *frozen)


#: A hook, which runs while all else is frozen, removes groups that were frozen with it.
REMOVE = """
mkdir -p /mnt/groups/empty /etc/ratoon/rebirth.d
printf '#!/bin/sh\\nrmdir /mnt/groups/empty' >/etc/ratoon/rebirth.d/10-remove
chmod +x /etc/ratoon/rebirth.d/10-remove
"""


async def test_a_group_that_is_gone_meanwhile_and_a_resume(engine: Engine, source: Sandbox) -> None:
    await start(source, "beside", "root")
    await sh(source, REMOVE)
    await engine.branch(source, "removed")
    async with await engine.fork_one("removed") as fork:
        assert "empty" not in await sh(fork, "ls /mnt/groups")
        await until_counting(fork, "beside", "root")
        await sh(fork, "rm /etc/ratoon/rebirth.d/*")
        await engine.standby(fork)
        await engine.resume(fork)
        await until_counting(fork, "beside", "root")


async def test_all_goes_on_after_a_freeze_that_took_too_long(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start(source, "nested", "beside", "root")
    monkeypatch.setattr(capture, "FREEZE_TIMEOUT", 0)
    branched = await engine.branch(source, "late")
    warning = branched.snapshot.manifest.warning
    assert warning is not None
    assert "did not stop within 0 s" in warning
    async with await engine.fork_one("late") as fork:
        for sandbox in (source, fork):
            await until_counting(sandbox, "nested", "beside", "root")


#: Moves all that is in the root group to another one, as scripts in containers do, and has the
#: sandbox's own group be one for groups alone.
TAKE_ALL = """
cd /mnt/groups
mkdir init sandbox/init
for pid in $(cat cgroup.procs); do echo $pid >init/cgroup.procs || true; done
for pid in $(cat sandbox/cgroup.procs); do echo $pid >sandbox/init/cgroup.procs || true; done
echo +memory >cgroup.subtree_control
echo +memory >sandbox/cgroup.subtree_control
cat init/cgroup.procs
"""
#: Removes commands' groups whenever they are empty, and there are to be no others.
NO_MORE = """
echo 0 >/mnt/groups/sandbox/cgroup.max.descendants
cat >/root/remove <<'END'
echo $$ >/mnt/groups/cgroup.procs
while :; do rmdir /mnt/groups/sandbox/command-*; sleep 0.01; done
END
setsid sh /root/remove >/dev/null 2>&1 &
"""
#: Processes in the root group that are not the kernel's, and those of the kernel's in others.
STRAYS = """
cd /mnt/groups
kernel() { [ $1 = 2 ] || grep -q '^PPid:.2$' /proc/$1/status; }
for pid in $(cat cgroup.procs); do kernel $pid || echo $pid; done
for pid in $(cat */cgroup.procs */*/cgroup.procs); do ! kernel $pid || echo $pid; done
"""


async def test_kernel_threads_are_the_root_groups_and_commands_find_a_place(
    engine: Engine, source: Sandbox
) -> None:
    await start(source, "root")
    assert (await sh(source, f"{TAKE_ALL} 2>/dev/null")).split()
    admitted = "while grep -q agent /proc/$$/cgroup; do sleep 0.05; done; cat /proc/$$/cgroup"
    assert (await sh(source, admitted)).startswith("0::/sandbox/command-")
    await sh(source, NO_MORE)
    while await sh(source, admitted) != "0::/sandbox-too\n":
        pass
    branched = await engine.branch(source, "taken")
    assert branched.snapshot.manifest.warning is None
    assert await sh(source, STRAYS) == ""
    async with await engine.fork_one("taken") as fork:
        for sandbox in (source, fork):
            await until_counting(sandbox, "root")
