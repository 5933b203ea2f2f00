"""Forks of a sandbox as it is now: whole, and individuals, while it goes on or stands by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from vm_helpers import (
    CHECK,
    WRITE,
    Counter,
    assert_whole,
    leaves_nothing,
    no_space,
    processes_of,
    sh,
)

from ratoon.engine.sandbox import layer
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict, HostError, RatoonError
from ratoon.machine.vmm.driver import Launch
from ratoon.machine.vmm.qemu import QemuMachine

#: A large file in memory and one on the disk, and one that is told by its name.
OWN = f"touch /root/{{0}}; {WRITE}"
NAMES = "hostname; cat /etc/machine-id /run/ratoon/instance-id /proc/sys/kernel/random/uuid"


@pytest.fixture
async def source(engine: Engine) -> AsyncIterator[Sandbox]:
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, WRITE.format("before"))
        yield sandbox


def images(engine: Engine) -> set[str]:
    return {path.stem for path in engine.images.directory.glob("*.ram")}


async def all_of(outcomes: list[Sandbox | RatoonError]) -> list[Sandbox]:
    forks = [each for each in outcomes if isinstance(each, Sandbox)]
    assert len(forks) == len(outcomes), outcomes
    return forks


@pytest.mark.parametrize("standing_by", [False, True], ids=["running", "standby"])
async def test_three_forks(engine: Engine, source: Sandbox, standing_by: bool) -> None:
    counter = await Counter.begin(source)
    before = images(engine)
    if standing_by:
        await engine.standby(source)
    with leaves_nothing(engine):
        forks = await all_of(await engine.fork_sandbox(source, 3))
        assert source.state == ("standby" if standing_by else "running")
        assert list(engine.store.staging.iterdir()) == []
        assert images(engine) == before
        # Each has what there was, and names of its own, and does what no other one sees.
        names = [(await sh(fork, f"{NAMES}; {OWN.format(fork.id)}")).split() for fork in forks]
        assert [len(set(kind)) for kind in zip(*names, strict=True)] == [3] * 4
        for fork in forks:
            assert await sh(fork, f"{CHECK}; ls /root/sb-*") == f"/root/{fork.id}\n"
        await counter.assert_counts(forks[-1])
        await asyncio.gather(*(fork.kill() for fork in forks))
    if standing_by:
        await engine.resume(source)
    assert set((await sh(source, NAMES)).split()).isdisjoint(
        {name for each in names for name in each}
    )
    await counter.assert_counts(source)
    await sh(source, f"{CHECK}; ! ls /root/sb-*")
    await assert_whole(engine, source)
    assert engine.store.info("next").ancestors == ["base"]


async def test_a_fork_of_a_sandbox_is_one_like_any_other(engine: Engine, source: Sandbox) -> None:
    """It is branched, stands by, and outlives the source and what that was forked from."""
    await engine.branch(source, "origin")
    await sh(source, WRITE.format("between"))
    (fork,) = await all_of(await engine.fork_sandbox(source))
    async with fork:
        await source.kill()
        await engine.delete("origin")
        assert (fork.record.forked_from, fork.snapshot_tag) == ("origin", "origin")
        await sh(fork, CHECK)
        await engine.standby(fork)
        await engine.resume(fork)
        await engine.reset(fork)
        await sh(fork, CHECK)
        await assert_whole(engine, fork)


async def test_its_options_are_the_sources_unless_others_are_given(engine: Engine) -> None:
    options = SandboxOptions(ttl_seconds=3600, metadata={"owner": "somebody"})
    async with await engine.fork_one("base", options) as source:
        (like,) = await all_of(await engine.fork_sandbox(source))
        (unlike,) = await all_of(await engine.fork_sandbox(source, 1, SandboxOptions()))
        async with like, unlike:
            assert like.options == source.options
            assert unlike.options.metadata == {}


async def test_one_that_fails_costs_one(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = QemuMachine.start
    started = []

    async def second_fails(launch: Launch) -> QemuMachine:
        started.append(launch)
        if len(started) == 2:
            no_space()
        return await start(launch)

    with monkeypatch.context() as patch, leaves_nothing(engine):
        patch.setattr(QemuMachine, "start", second_fails)
        outcomes = await engine.fork_sandbox(source, 3)
        (failure,) = (each for each in outcomes if not isinstance(each, Sandbox))
        assert isinstance(failure, HostError)
        for fork in outcomes:
            if isinstance(fork, Sandbox):
                await sh(fork, CHECK)
                await fork.kill()
    await assert_whole(engine, source)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(layer, "writing_page_set"), (SandboxDirectory, "_replace_parent"), (QemuMachine, "start")],
    ids=["written", "stood on", "started"],
)
async def test_a_failure_leaves_the_source_whole(
    engine: Engine,
    source: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
) -> None:
    with monkeypatch.context() as patch, leaves_nothing(engine):
        patch.setattr(owner, name, no_space)
        if owner is QemuMachine:
            (failure,) = await engine.fork_sandbox(source)
        else:
            with pytest.raises(HostError) as caught:
                await engine.fork_sandbox(source)
            failure = caught.value
        assert f"{source.id} was not forked: No space left" in str(failure)
    assert source.state == "running"
    assert [path.name for path in source.directory.path.glob("standby*")] == []
    await sh(source, CHECK)
    await assert_whole(engine, source)


async def test_a_killed_one_is_not_forked(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        pass
    with leaves_nothing(engine), pytest.raises(Conflict, match=f"{sandbox.id} was killed"):
        await engine.fork_sandbox(sandbox)


async def test_forks_while_it_is_branched_and_suspended(engine: Engine, source: Sandbox) -> None:
    """Each takes its turn, whatever the order."""
    outcomes = await asyncio.gather(
        engine.fork_sandbox(source),
        engine.branch(source, "meanwhile"),
        engine.fork_sandbox(source, 2),
        engine.standby(source),
        engine.fork_sandbox(source),
    )
    forks = [fork for outcome in outcomes if isinstance(outcome, list) for fork in outcome]
    for fork in await all_of(forks):
        await sh(fork, CHECK)
        await fork.kill()
    assert processes_of(engine.store.sandboxes / source.id) == []
    await engine.resume(source)
    await sh(source, CHECK)
    await assert_whole(engine, source)
