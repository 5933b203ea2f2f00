"""Reset: back to a sandbox's origin, as the same individual; its memory is given back."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter as Multiset
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vm_helpers import (
    CHECK,
    WRITE,
    Counter,
    assert_in_the_present,
    assert_whole,
    open_files,
    processes_of,
    sh,
)

from ratoon import paths
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict, MachineDied
from ratoon.machine.host.usage import usage
from ratoon.units import MIB

NAMES = "hostname; cat /etc/machine-id /run/ratoon/instance-id"
RANDOM = "cat /proc/sys/kernel/random/uuid"


@pytest.fixture(scope="module")
async def counter(engine: Engine) -> AsyncIterator[Counter]:
    """Snapshot `origin`, and who counts in it."""
    async with await engine.fork_one("base") as maker:
        await sh(maker, WRITE.format("origin"))
        counter = await Counter.begin(maker)
        await engine.branch(maker, "origin")
    yield counter
    await engine.settle()
    await engine.delete("origin", force=True)


@pytest.fixture
async def source(
    engine: Engine, counter: Counter, request: pytest.FixtureRequest
) -> AsyncIterator[Sandbox]:
    """A sandbox that stands on `origin`, with a spare machine where a test asks for that."""
    options = SandboxOptions(spare=getattr(request, "param", False))
    async with await engine.fork_one("origin", options) as sandbox:
        yield sandbox


with_and_without_a_spare = pytest.mark.parametrize(
    "source", [False, True], ids=["", "spare"], indirect=True
)


async def spare_waits(sandbox: Sandbox) -> None:
    """The spare machine, if it has one, is started."""
    if sandbox.spare._starting:
        await asyncio.wait((sandbox.spare._starting,))


def files_of(engine: Engine, sandbox: Sandbox) -> list[str]:
    """All that it has in the store and among the sockets, whatever the number in the name."""
    places = sandbox.directory.path, paths.runtime(engine.store.home) / sandbox.id
    return sorted(re.sub(r"-?\d+", "", path.name) for place in places for path in place.rglob("*"))


@with_and_without_a_spare
async def test_it_is_the_same_individual_in_an_earlier_state(
    engine: Engine, source: Sandbox, counter: Counter
) -> None:
    names = await sh(source, NAMES)
    seen = {await sh(source, RANDOM)}
    for _ in range(2):
        await sh(source, WRITE.format("lost") + "rm /root/origin")
        writer = (await sh(source, "sleep 1000 >/dev/null 2>&1 & echo $!")).strip()
        before = source.pid
        await engine.reset(source)
        assert source.pid != before
        assert not Path(f"/proc/{before}").exists()
        # All is as it was, and what ran then runs on from there.
        await sh(source, f"{CHECK}; ! ls /root/lost /dev/shm/lost; ! kill -0 {writer}")
        assert await sh(source, NAMES) == names
        await counter.assert_counts(source)
        seen.add(await sh(source, RANDOM))
    assert len(seen) == 3
    await assert_in_the_present(source)
    assert (source.snapshot_tag, source.record.forked_from) == ("origin", "origin")
    await assert_whole(engine, source)


async def test_after_a_branch_it_goes_back_to_that_and_after_a_standby_too(
    engine: Engine, source: Sandbox
) -> None:
    await sh(source, WRITE.format("branched"))
    await engine.branch(source, "branched")
    await sh(source, WRITE.format("lost"))
    await engine.reset(source)
    await sh(source, f"{CHECK}; ls /root/branched; ! ls /root/lost")
    await sh(source, WRITE.format("stood-by"))
    await engine.standby(source)
    await engine.resume(source)
    await sh(source, WRITE.format("lost"))
    await engine.reset(source)
    await sh(source, f"{CHECK}; ls /root/branched; ! ls /root/lost /root/stood-by")
    await sh(source, WRITE.format("in-full"))
    await engine.branch(source, "full", "full")
    await sh(source, WRITE.format("lost"))
    await engine.reset(source)
    await sh(source, f"{CHECK}; ls /root/branched /root/in-full; ! ls /root/lost")
    assert source.snapshot_tag == "full"
    await assert_whole(engine, source)


async def test_memory_is_given_back(engine: Engine, source: Sandbox) -> None:
    await sh(source, "head -c 67108864 /dev/urandom >/dev/shm/large")
    before = usage(source.pid, source.incarnation.overlay)
    await engine.reset(source)
    after = usage(source.pid, source.incarnation.overlay)
    assert before is not None
    assert after is not None
    assert after.memory_bytes < before.memory_bytes - 48 * MIB


@with_and_without_a_spare
async def test_ten_in_a_row_leave_nothing(engine: Engine, source: Sandbox) -> None:
    await engine.reset(source)
    await spare_waits(source)
    before = files_of(engine, source)
    descriptors = Multiset(open_files())
    for number in range(10):
        await sh(source, f"echo {number} >>/root/resets")
        await engine.reset(source)
    await spare_waits(source)
    assert files_of(engine, source) == before
    assert len(processes_of(source.directory.path)) == 1 + source.options.spare
    assert sorted((Multiset(open_files()) - descriptors).elements()) == []
    await sh(source, f"{CHECK}; ! ls /root/resets")


async def test_of_a_dead_one(engine: Engine, source: Sandbox) -> None:
    """What it did is lost with its machine, but not what a reset goes back to."""
    os.kill(source.pid, signal.SIGKILL)
    with pytest.raises(MachineDied):
        await sh(source, "true")
    await engine.reset(source)
    assert source.state == "running"
    await sh(source, CHECK)


@pytest.mark.parametrize("source", [True], indirect=True)
async def test_a_spare_that_died_is_not_used(engine: Engine, source: Sandbox) -> None:
    await spare_waits(source)
    (spare,) = set(processes_of(source.directory.path)) - {source.pid}
    os.kill(spare, signal.SIGKILL)
    await engine.reset(source)
    await sh(source, CHECK)


@pytest.mark.parametrize("source", [True], indirect=True)
async def test_after_any_branch_the_spare_is_of_that(engine: Engine, source: Sandbox) -> None:
    for number, branch in enumerate((engine.branch, engine.begin_branch)):
        await spare_waits(source)
        await sh(source, f"echo {number} >/root/branched")
        await branch(source, f"next-{number}")
        await engine.settle()
        await spare_waits(source)
        (spare,) = set(processes_of(source.directory.path)) - {source.pid}
        await sh(source, "rm /root/branched")
        await engine.reset(source)
        assert source.pid == spare
        await sh(source, f"{CHECK}; [ $(cat /root/branched) = {number} ]")


async def test_a_command_under_way_is_told(engine: Engine, source: Sandbox) -> None:
    command = asyncio.create_task(source.exec(["sleep", "1000"]))
    await sh(source, "true")
    await engine.reset(source)
    with pytest.raises(Conflict, match=f"{source.id} was reset while it was being used"):
        await command
    await sh(source, CHECK)


@with_and_without_a_spare
async def test_a_cancelled_one_leaves_nothing(engine: Engine, source: Sandbox) -> None:
    """Whether it is reset or not: that depends on how far it was."""
    await spare_waits(source)
    before = files_of(engine, source)
    for turns in (0, 2, 8, 32):
        resetting = asyncio.create_task(engine.reset(source))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        resetting.cancel()
        await asyncio.gather(resetting, return_exceptions=True)
        await sh(source, CHECK)
    await spare_waits(source)
    await engine.reset(source)
    await spare_waits(source)
    assert files_of(engine, source) == before
    assert len(processes_of(source.directory.path)) == 1 + source.options.spare
    await sh(source, CHECK)


async def test_cancelled_when_the_new_machine_has_answered(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is too late: what was before goes to its end."""
    become = Sandbox.become

    def then_cancel(sandbox: Sandbox, run: Incarnation | None) -> Incarnation | None:
        resetting.cancel()
        return become(sandbox, run)

    before = files_of(engine, source)
    monkeypatch.setattr(Sandbox, "become", then_cancel)
    resetting = asyncio.create_task(engine.reset(source))
    with pytest.raises(asyncio.CancelledError):
        await resetting
    assert processes_of(source.directory.path) == [source.pid]
    assert files_of(engine, source) == before
    await sh(source, CHECK)
