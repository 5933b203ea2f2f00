"""Full branches, which stand on nothing, and live ones, written while the sandbox runs."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from vm_helpers import CHECK, FOR_EVER, WRITE, assert_whole, leaves_nothing, no_space, sh, until

from ratoon.engine.sandbox import branch, layer
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import AlreadyExists, Conflict, HostError, InFlight, InvalidInput, NotFound
from ratoon.store.memory.writing import writing_page_set
from ratoon.store.snapshot import compact
from ratoon.store.snapshot.diff import diff


@pytest.fixture
async def source(engine: Engine) -> AsyncIterator[Sandbox]:
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, WRITE.format("before"))
        yield sandbox


# Full -----------------------------------------------------------------------------------------


async def test_a_full_branch_stands_on_nothing_and_has_all(engine: Engine, source: Sandbox) -> None:
    await engine.branch(source, "first")
    await sh(source, WRITE.format("between"))
    full = (await engine.branch(source, "full", "full")).snapshot.manifest
    assert (full.parent, len(full.layers), source.snapshot_tag) == (None, 1, "full")
    assert engine.store.info("full").ancestors == []
    assert engine.store.info("first").dependents == []
    await sh(source, WRITE.format("later"))
    child = (await engine.branch(source, "child")).snapshot.manifest
    assert child.parent == full.reference
    assert child.layers[-1].memory.entries < full.layers[0].memory.entries / 4
    await engine.delete("first")
    for tag, there in (("full", False), ("child", True)):
        async with await engine.fork_one(tag) as fork:
            sums = await sh(fork, f"{CHECK}; cat /dev/shm/sums")
            assert ("between" in sums, "later" in sums) == (True, there)
    await assert_whole(engine, source)


async def test_full_and_diff_are_equal(engine: Engine, source: Sandbox) -> None:
    """Nothing is used in between, so all that differs is what an idle guest does."""
    first = (await engine.branch(source, "diff")).snapshot.manifest
    again = (await engine.branch(source, "again")).snapshot.manifest
    await engine.branch(source, "full", "full")
    assert again.layers[-1].memory.entries < first.layers[-1].memory.entries / 4
    found = diff(engine.store, "again", "full")
    assert found.changed_pages < first.layers[-1].memory.entries / 4
    assert found.files is not None
    assert (found.files.added, found.files.removed) == ((), ())


@pytest.mark.parametrize("name", ["_merge_memory", "_merge_disk"])
async def test_a_full_branch_that_fails(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with leaves_nothing(engine), monkeypatch.context() as patch:
        patch.setattr(compact, name, no_space)
        with pytest.raises(HostError, match="No space left"):
            await engine.branch(source, "failed", "full")
    assert source.snapshot_tag == "base"
    await assert_whole(engine, source)


# Live -----------------------------------------------------------------------------------------


class Held:
    """Holds up what writes a snapshot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._go_on = threading.Event()
        self.fails = False
        self._write = writing_page_set
        monkeypatch.setattr(layer, "writing_page_set", self._hold)

    def _hold(self, *arguments: Any) -> Any:
        self._go_on.wait(FOR_EVER)
        if self.fails:
            no_space()
        return self._write(*arguments)

    def let_go(self, *, fails: bool = False) -> None:
        self.fails = fails
        self._go_on.set()


async def test_a_live_branch_is_written_while_the_sandbox_runs(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch)
    live = await engine.begin_branch(source, "live")
    assert (live.tag, live.status, engine.writing) == ("live", "writing", (live,))
    assert live.pause_ms > 0
    await sh(source, WRITE.format("meanwhile"))
    for refused in (
        lambda: engine.fork_one("live"),
        lambda: engine.fork("live", 2),
        lambda: engine.delete("live", force=True),
        lambda: engine.begin_branch(source, "live"),
        lambda: engine.branch(source, "live"),
    ):
        with pytest.raises(InFlight, match="live"):
            await refused()
    with pytest.raises(InFlight, match="live"):
        engine.store.get("live")
    held.let_go()
    branched = await live.done
    assert (live.status, engine.writing) == ("ready", ())
    assert branched.pause_ms == live.pause_ms
    with pytest.raises(AlreadyExists):
        await engine.begin_branch(source, "live")
    async with await engine.fork_one("live") as fork:
        assert "meanwhile" not in await sh(fork, f"{CHECK}; cat /dev/shm/sums")
    await assert_whole(engine, source)
    assert engine.store.info("live").dependents == ["next"]


async def test_a_live_branch_that_fails_says_why(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, leaves_nothing(engine):
        held = Held(patch)
        live = await engine.begin_branch(source, "live")
        await sh(source, WRITE.format("meanwhile"))
        held.let_go(fails=True)
        await until(lambda: live.status == "failed", "the failure")
        assert "No space left" in live.reason
        assert engine.writing == (live,)
        with pytest.raises(Conflict, match=r"live was not written: .*No space left"):
            await engine.fork_one("live")
        assert await engine.delete("live") == ("live",)
        assert not engine.writing
        with pytest.raises(NotFound):
            await engine.delete("live")
    await sh(source, CHECK)
    assert source.snapshot_tag == "base"
    again = await engine.begin_branch(source, "live")
    await again.done
    async with await engine.fork_one("live") as fork:
        assert "meanwhile" in await sh(fork, f"{CHECK}; cat /dev/shm/sums")
    await assert_whole(engine, source)


async def test_a_failure_does_not_hide_a_snapshot_that_was_made_later(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in ("forked", "deleted"):
        with monkeypatch.context() as patch:
            held = Held(patch)
            live = await engine.begin_branch(source, made)
            held.let_go(fails=True)
            await until(lambda live=live: live.status == "failed", "the failure")  # type: ignore[misc]
        await engine.branch(source, made)
    async with await engine.fork_one("forked") as fork:
        await sh(fork, CHECK)
    assert await engine.delete("deleted") == ("deleted",)
    with pytest.raises(NotFound):
        engine.store.get("deleted")
    await engine.delete("forked")
    assert engine.writing == ()


async def test_what_fails_before_the_sandbox_runs_again_is_no_live_branch(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, leaves_nothing(engine):
        patch.setattr(branch, "capture", no_space)
        with pytest.raises(HostError, match="No space left"):
            await engine.begin_branch(source, "live")
    with pytest.raises(InvalidInput):
        await engine.begin_branch(source, "no/tag")
    with pytest.raises(AlreadyExists):
        await engine.begin_branch(source, "base")
    assert engine.writing == ()
    await assert_whole(engine, source)


async def test_a_full_branch_can_be_live(engine: Engine, source: Sandbox) -> None:
    live = await engine.begin_branch(source, "live", "full")
    await sh(source, WRITE.format("meanwhile"))
    assert (await live.done).snapshot.depth == 0
    async with await engine.fork_one("live") as fork:
        assert "meanwhile" not in await sh(fork, f"{CHECK}; cat /dev/shm/sums")
    await assert_whole(engine, source)


async def test_killed_while_a_live_branch_is_written(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was taken is there: the machine is not needed any more."""
    held = Held(monkeypatch)
    async with await engine.fork_one("base") as doomed:
        await sh(doomed, WRITE.format("before"))
        live = await engine.begin_branch(doomed, "live")
        held.let_go()
    await live.done
    async with await engine.fork_one("live") as fork:
        await sh(fork, CHECK)
