"""A branch that fails, whenever that is: the sandbox goes on, the store is as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from vm_helpers import CHECK, FOR_EVER, WRITE, assert_whole, leaves_nothing, no_space, sh

from ratoon import files
from ratoon.engine.sandbox import branch, capture, layer
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import AlreadyExists, HostError, InFlight, MachineError
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.snapshot.staging import Staging


@pytest.fixture
async def source(engine: Engine) -> AsyncIterator[Sandbox]:
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, WRITE.format("before"))
        yield sandbox


async def refuse(machine: QemuMachine) -> None:
    raise MachineError("refused")


FAILURES: list[tuple[Any, str]] = [
    (capture, "dirty_pages"),
    (capture, "read_into"),
    (layer, "writing_page_set"),
    (layer, "file_digest"),
    (Staging, "adopt_ancestry"),
    (Staging, "publish"),
    (QemuMachine, "add_overlay"),
    (QemuMachine, "pause"),
    (QemuMachine, "save_state"),
    (QemuMachine, "switch_overlay"),
]


@pytest.mark.parametrize(("owner", "name"), FAILURES, ids=[name for _, name in FAILURES])
async def test_the_machine_is_resumed_after_a_failure_at(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    with leaves_nothing(engine), monkeypatch.context() as patch:
        patch.setattr(owner, name, no_space)
        with pytest.raises(HostError, match="No space left"):
            await engine.branch(source, "failed")
    assert source.snapshot_tag == "base"
    assert len([*source.directory.path.glob("disk*.qcow2")]) == 1
    await assert_whole(engine, source)


async def test_what_is_written_meanwhile_survives(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the switch to the new overlay and the failure the guest writes to that one."""
    loop = asyncio.get_running_loop()

    def write_then_fail(*arguments: object) -> None:
        asyncio.run_coroutine_threadsafe(sh(source, WRITE.format("between")), loop).result(FOR_EVER)
        no_space()

    with leaves_nothing(engine), monkeypatch.context() as patch:
        patch.setattr(layer, "writing_page_set", write_then_fail)
        with pytest.raises(HostError, match="No space left"):
            await engine.branch(source, "failed")
    await sh(source, CHECK)
    await assert_whole(engine, source)


async def test_failures_under_a_guest_that_never_stops_writing(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "i=0; while [ ! -e /tmp/stop ]; do i=$((i+1)); head -c 300000 /dev/urandom >/root/w$i;"
    script += "sha256sum /root/w$i >>/root/wsums; sync; done; sync; wc -l </root/wsums"
    writer = asyncio.create_task(source.exec(["sh", "-c", script]))
    for _ in range(3):
        await asyncio.sleep(0.2)
        with monkeypatch.context() as patch:
            patch.setattr(Staging, "publish", no_space)
            with pytest.raises(HostError, match="No space left"):
                await engine.branch(source, "failed")
    await sh(source, "until [ $(wc -l </root/wsums) -gt 3 ]; do sleep 0.05; done")
    await engine.branch(source, "busy")
    await sh(source, "touch /tmp/stop")
    assert int((await writer).stdout) > 3
    check = "echo 3 >/proc/sys/vm/drop_caches; sha256sum --quiet -c /root/wsums"
    await sh(source, check)
    async with await engine.fork_one("busy") as fork:
        await sh(fork, f"touch /tmp/stop; sleep 1; {check}")
    await assert_whole(engine, source)


async def test_an_undo_that_fails_is_made_up_for(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(layer, "writing_page_set", no_space)
        patch.setattr(QemuMachine, "undo_overlay", refuse)
        with pytest.raises(HostError, match="No space left"):
            await engine.branch(source, "failed")
        await sh(source, WRITE.format("between"))
        with pytest.raises(MachineError, match="refused"), leaves_nothing(engine):
            await engine.branch(source, "failed")
    await assert_whole(engine, source)


async def test_published_but_not_linked(
    engine: Engine,
    source: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Too late to undo: a published disk layer never changes, and the sandbox stands on it."""
    with monkeypatch.context() as patch:
        patch.setattr(SandboxDirectory, "stand_on", no_space)
        await engine.branch(source, "published")
    assert "do not delete that snapshot" in caplog.text
    await assert_stands_on(engine, source, "published")


async def test_published_but_not_flushed(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last fsync fails, after the rename: the snapshot is there, and stays as it is."""

    def flush(path: Path) -> None:
        if path == engine.store.snapshots:
            no_space()
        fsync_path(path)

    fsync_path = files.fsync_path
    with monkeypatch.context() as patch:
        patch.setattr(files, "fsync_path", flush)
        with pytest.raises(HostError, match="No space left"):
            await engine.branch(source, "published")
    await assert_stands_on(engine, source, "published")


async def assert_stands_on(engine: Engine, source: Sandbox, tag: str) -> None:
    assert source.snapshot_tag == tag
    await sh(source, WRITE.format("between"))
    await sh(source, CHECK)
    await assert_whole(engine, source)
    async with await engine.fork_one(tag) as fork:
        await sh(fork, CHECK)
        assert "between" not in await sh(fork, "cat /dev/shm/sums")


async def test_one_tag_for_two_at_once(engine: Engine, source: Sandbox) -> None:
    async with await engine.fork_one("base") as other:
        outcomes = await asyncio.gather(
            *(engine.branch(each, "wanted") for each in (source, other)), return_exceptions=True
        )
        assert sum(isinstance(outcome, branch.Branched) for outcome in outcomes) == 1
        (loss,) = (outcome for outcome in outcomes if isinstance(outcome, BaseException))
        assert isinstance(loss, AlreadyExists | InFlight)
        assert "wanted" in str(loss)
        await engine.branch(other, "others")
        assert sorted((source.snapshot_tag or "", other.snapshot_tag or "")) in (
            ["base", "others"],
            ["others", "wanted"],
        )
    await assert_whole(engine, source)


async def test_two_branches_of_one_sandbox_at_once(engine: Engine, source: Sandbox) -> None:
    await asyncio.gather(*(engine.branch(source, f"at-once{n}") for n in range(3)))
    depths = sorted(engine.store.info(f"at-once{n}").chain_depth for n in range(3))
    assert depths == [1, 2, 3]
    await assert_whole(engine, source)
