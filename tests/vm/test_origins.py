"""A sandbox's origin, which a reset goes back to: its last branch, else what it was forked from.

What it stood on in between makes no difference, nor does who has it by now.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from vm_helpers import CHECK, WRITE, assert_whole, no_space, processes_of, sh, until

from ratoon.engine.sandbox import condense, directory, layer
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict, HostError
from ratoon.store.check.check import check_store
from ratoon.store.check.scrub import Slice
from ratoon.store.snapshot.usage import usage
from ratoon.units import MIB

Way = Callable[[Engine, Sandbox], Awaitable[None]]


@pytest.fixture
async def source(engine: Engine, request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    """A sandbox that was branched as `origin`, and has gone on since."""
    options = SandboxOptions(spare=getattr(request, "param", False))
    async with await engine.fork_one("base", options) as sandbox:
        await sh(sandbox, WRITE.format("kept"))
        await engine.branch(sandbox, "origin")
        await sh(sandbox, WRITE.format("lost"))
        yield sandbox


async def assert_back(engine: Engine, sandbox: Sandbox, tag: str = "origin") -> None:
    """A reset has taken it to `tag`, and it has nothing else to itself."""
    await sh(sandbox, f"{CHECK}; ls /root/kept; ! ls /root/lost /dev/shm/lost")
    assert sandbox.snapshot_tag == tag
    assert sandbox.parent is sandbox.origin
    assert sandbox.parent
    assert not sandbox.parent.manifest.layers[-1].anonymous
    assert not (sandbox.directory.path / "origin").exists()


async def stand_by(engine: Engine, sandbox: Sandbox) -> None:
    await engine.standby(sandbox)
    await engine.resume(sandbox)


async def doze(engine: Engine, sandbox: Sandbox) -> None:
    options = sandbox.options
    sandbox.options = options.model_copy(update={"idle_seconds": 0.01, "idle_counts": "calls"})
    await until(lambda: sandbox.state == "standby", "its standby")
    sandbox.options = options


async def fork(engine: Engine, sandbox: Sandbox) -> None:
    (forked,) = await engine.fork_sandbox(sandbox)
    assert isinstance(forked, Sandbox)
    await forked.kill()


async def fork_in_standby(engine: Engine, sandbox: Sandbox) -> None:
    await engine.standby(sandbox)
    await fork(engine, sandbox)
    await engine.resume(sandbox)


async def condensed(engine: Engine, sandbox: Sandbox) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(condense, "LIMIT", 1)
        for _ in range(3):
            await stand_by(engine, sandbox)
    assert sandbox.parent
    assert sandbox.parent.depth == 2


async def fail_to_branch(engine: Engine, sandbox: Sandbox) -> None:
    await stand_by(engine, sandbox)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "file_digest", no_space)
        with pytest.raises(HostError):
            await engine.branch(sandbox, "never")


async def lose_its_snapshot(engine: Engine, sandbox: Sandbox) -> None:
    await stand_by(engine, sandbox)
    await engine.delete("origin")


@pytest.mark.parametrize(
    "way", [stand_by, doze, fork, fork_in_standby, condensed, fail_to_branch, lose_its_snapshot]
)
async def test_it_is_the_last_branch(engine: Engine, source: Sandbox, way: Way) -> None:
    await way(engine, source)
    await sh(source, WRITE.format("lost"))
    await engine.reset(source)
    await assert_back(engine, source)
    await assert_whole(engine, source)
    made = engine.store.get("next").manifest
    assert [each.tag for each in made.layers] == ["base", "origin", "next"]
    assert made.parent
    assert made.parent.tag == "origin"


@pytest.mark.parametrize("mode", ["full", "live"])
async def test_a_branch_after_a_standby_is_the_next_one(
    engine: Engine, source: Sandbox, mode: str
) -> None:
    await stand_by(engine, source)
    await sh(source, "rm /root/lost /dev/shm/lost; sed -i /lost/d /dev/shm/sums; sync")
    if mode == "full":
        await engine.branch(source, "next-one", "full")
    else:
        await (await engine.begin_branch(source, "next-one")).done
    await sh(source, WRITE.format("lost"))
    await stand_by(engine, source)
    await engine.reset(source)
    await assert_back(engine, source, "next-one")


async def test_of_a_fork_it_is_what_its_source_was(engine: Engine, source: Sandbox) -> None:
    """Also when the fork has stood by; and the source goes back to its own origin all the same."""
    (forked,) = await engine.fork_sandbox(source)
    assert isinstance(forked, Sandbox)
    async with forked:
        await sh(forked, WRITE.format("of-the-fork"))
        await stand_by(engine, forked)
        await engine.reset(forked)
        await sh(forked, f"{CHECK}; ls /root/kept /root/lost; ! ls /root/of-the-fork")
        await fork(engine, forked)
        await sh(forked, WRITE.format("of-the-fork"))
        await engine.reset(forked)
        await sh(forked, f"{CHECK}; ls /root/kept /root/lost; ! ls /root/of-the-fork")
        assert forked.snapshot_tag == "origin"
        await assert_whole(engine, forked)
        assert engine.store.info("next").ancestors == ["base", "origin"]
    await engine.reset(source)
    await assert_back(engine, source)


@pytest.mark.parametrize("source", [True], indirect=True)
async def test_a_spare_machine_waits_on_it(engine: Engine, source: Sandbox) -> None:
    for way in (fork, stand_by):
        await way(engine, source)
        await source.spare.settle()
        (spare,) = set(processes_of(source.directory.path)) - {source.pid}
        await engine.reset(source)
        assert source.pid == spare
        await assert_back(engine, source)


@pytest.mark.parametrize("in_standby", [False, True])
async def test_of_one_that_was_taken_over(
    engine: Engine, source: Sandbox, in_standby: bool
) -> None:
    """By the engine after next; what it was forked from, as it has no branch, is gone."""
    home = engine.store.home
    async with Engine.open(home, keep=True) as first:
        sandbox = await first.fork_one("origin")
        await sh(sandbox, WRITE.format("lost"))
        await stand_by(first, sandbox)
        if in_standby:
            await first.standby(sandbox)
    await source.kill()
    await engine.delete("origin")
    async with Engine.open(home, keep=True):
        pass
    async with Engine.open(home, keep=True) as third:
        (sandbox,) = third.sandboxes
        async with sandbox:
            if in_standby:
                await third.resume(sandbox)
            await third.reset(sandbox)
            await assert_back(third, sandbox)
            await assert_whole(third, sandbox)


async def test_one_whose_layers_could_not_be_linked(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands on the snapshot in the store: its directory has that as soon as it can."""
    home = engine.store.home
    async with Engine.open(home, keep=True) as first:
        sandbox = await first.fork_one("origin")
        for tag in ("unlinked", "unlinked-too"):
            await sh(sandbox, WRITE.format(tag))
            with monkeypatch.context() as patch:
                patch.setattr(directory, "link_snapshot", no_space)
                await first.branch(sandbox, tag)
            if tag == "unlinked":
                await stand_by(first, sandbox)
                await first.reset(sandbox)
        sandbox.persist()
    async with Engine.open(home, keep=True) as second:
        (sandbox,) = second.sandboxes
        async with sandbox:
            assert sandbox.snapshot_tag == "unlinked-too"
            await sh(sandbox, WRITE.format("lost"))
            await stand_by(second, sandbox)
            await second.reset(sandbox)
            await assert_back(second, sandbox, "unlinked-too")
            await sh(sandbox, "ls /root/unlinked /root/unlinked-too")
            await assert_whole(second, sandbox)


async def made_by_an_older_ratoon(engine: Engine) -> str:
    """A sandbox that stood by, of which nobody kept what it goes back to; its id."""
    async with Engine.open(engine.store.home, keep=True) as older:
        sandbox = await older.fork_one("origin")
        await sh(sandbox, WRITE.format("lost"))
        await stand_by(older, sandbox)
    shutil.rmtree(sandbox.directory.path / "origin")
    return sandbox.id


async def test_of_an_older_ratoon_it_is_taken_from_the_store(
    engine: Engine, source: Sandbox
) -> None:
    name = await made_by_an_older_ratoon(engine)
    async with Engine.open(engine.store.home, keep=True) as newer:
        sandbox = newer.get(name)
        async with sandbox:
            await source.kill()
            await engine.delete("origin")
            await newer.reset(sandbox)
            await assert_back(newer, sandbox)


async def test_of_an_older_ratoon_it_may_be_gone(engine: Engine, source: Sandbox) -> None:
    name = await made_by_an_older_ratoon(engine)
    await source.kill()
    await engine.delete("origin")
    async with await engine.fork_one("base") as another:
        await engine.branch(another, "origin")  # the same tag is not the same snapshot
    async with Engine.open(engine.store.home, keep=True) as newer:
        sandbox = newer.get(name)
        async with sandbox:
            with pytest.raises(Conflict, match=r"snapshot origin is gone.*; branch the sandbox"):
                await newer.reset(sandbox)
            await sh(sandbox, f"{CHECK}; ls /root/kept /root/lost")
            await newer.branch(sandbox, "way-out")
            await sh(sandbox, WRITE.format("since"))
            await stand_by(newer, sandbox)
            await newer.reset(sandbox)
            await sh(sandbox, f"{CHECK}; ls /root/kept /root/lost; ! ls /root/since")


async def test_what_is_written_down_is_what_older_ratoons_read(
    engine: Engine, source: Sandbox
) -> None:
    """They refuse a record with more in it; one is needed in passing alone."""
    async with (
        Engine.open(engine.store.home, keep=True) as kept,
        await kept.fork_one("origin") as sandbox,
    ):
        await stand_by(kept, sandbox)
        await kept.reset(sandbox)
        record = json.loads((sandbox.directory.path / "state.json").read_bytes())
        assert set(record["run"]) == {
            *("boot_id", "pid", "started", "memory", "overlay", "runtime", "uplink")
        }


async def test_it_takes_no_room_but_keeps_what_it_has(engine: Engine) -> None:
    """It is the twin that the sandbox stood on, under another name."""
    async with await engine.fork_one("base") as source:
        await sh(source, "head -c 4194304 /dev/urandom >/dev/shm/own")
        await engine.branch(source, "origin")
        await sh(source, "rm /dev/shm/own; head -c 4194304 /dev/zero | tr '\\0' x >/dev/shm/other")
        assert source.parent
        inode = source.parent.memory_path(1).stat().st_ino
        await engine.standby(source)
        assert source.origin
        assert source.origin.memory_path(1).stat().st_ino == inode
        before = (await asyncio.to_thread(usage, engine.store)).sandboxes[source.id]
        images = {path.name for path in engine.store.images.iterdir()}
        await engine.delete("origin")
        after = (await asyncio.to_thread(usage, engine.store)).sandboxes[source.id]
        assert abs(after.total - before.total) < MIB
        assert after.own > before.own + 4 * MIB
        report = await asyncio.to_thread(check_store, engine.store, read_data=Slice(1, 1))
        assert [found for found in report.findings if found.file.name not in images] == []


@pytest.mark.parametrize("spare", [False, True])
async def test_images_of_what_was_deleted_go_with_the_last_that_stood_on_it(
    engine: Engine, spare: bool
) -> None:
    """A reset for the second time has one made, of the sandbox's own twin."""
    await engine.settle()
    before = {path.name for path in engine.store.images.glob("*.ram")}
    for leave in ("kill", "branch"):
        async with await engine.fork_one("base") as source:
            await sh(source, WRITE.format("kept"))
            await engine.branch(source, "origin")
        async with await engine.fork_one("origin", SandboxOptions(spare=spare)) as sandbox:
            await engine.delete("origin")
            for _ in range(3):
                await engine.reset(sandbox)
                await sandbox.spare.settle()
            await engine.settle()
            after = {path.name for path in engine.store.images.glob("*.ram")}
            assert len(after - before) == 1, "there is nothing to be removed"
            if leave == "branch":
                await engine.branch(sandbox, "left")
                await engine.settle()
                await engine.delete("left")
                assert {path.name for path in engine.store.images.glob("*.ram")} == before
        await engine.settle()
        assert {path.name for path in engine.store.images.glob("*.ram")} == before
