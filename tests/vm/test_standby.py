"""Standby: no process and no memory is left, and a resume goes on where the sandbox stood."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from vm_helpers import (
    CHECK,
    CLOCK_TOLERANCE,
    WRITE,
    Counter,
    assert_in_the_present,
    assert_whole,
    no_space,
    processes_of,
    sh,
)

from ratoon import paths
from ratoon.engine.sandbox import condense
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict, HasDependents
from ratoon.machine.guest import commands
from ratoon.machine.guest.shared import wire

NAMES = "hostname; cat /etc/machine-id /run/ratoon/instance-id /proc/sys/kernel/random/boot_id"


def assert_nothing_runs(engine: Engine, sandbox: Sandbox, pid: int) -> None:
    """All that is left of a sandbox is what it stands on, itself, and what a reset goes back to."""
    assert sandbox.state == "standby"
    assert not Path(f"/proc/{pid}").exists()
    assert processes_of(sandbox.directory.path) == []
    assert not any((paths.runtime(engine.store.home) / sandbox.id).glob("*"))
    assert {path.name for path in sandbox.directory.path.iterdir()} <= {
        *("parent", "origin", "state.json", "log", "log.console")
    }


async def test_all_of_a_sandbox_comes_back_again_and_again(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        names = await sh(sandbox, NAMES)
        counter = await Counter.begin(sandbox)
        for cycle in range(3):
            await sh(sandbox, WRITE.format(cycle))
            pid = sandbox.pid
            await engine.standby(sandbox)
            assert_nothing_runs(engine, sandbox, pid)
            await engine.resume(sandbox)
            assert sandbox.state == "running"
            assert await sh(sandbox, NAMES) == names
            await sh(sandbox, CHECK)
            await counter.assert_counts(sandbox)
        await assert_whole(engine, sandbox)


async def test_what_it_alone_has_does_not_grow_without_end(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def stand_by() -> int:
        await engine.standby(sandbox)
        await engine.resume(sandbox)
        assert sandbox.parent
        return sandbox.parent.depth

    monkeypatch.setattr(condense, "LIMIT", 1)
    async with await engine.fork_one("base") as sandbox:
        await engine.branch(sandbox, "first")
        counter = await Counter.begin(sandbox)
        await sh(sandbox, WRITE.format("one"))
        assert await stand_by() == 2
        await sh(sandbox, WRITE.format("two"))
        with monkeypatch.context() as patch:
            patch.setattr(condense, "publish_condensed", no_space)
            assert await stand_by() == 3
        assert f"the layers of sandbox {sandbox.id} were not merged: " in caplog.text
        await sh(sandbox, WRITE.format("three"))
        assert await stand_by() == 2
        await sh(sandbox, CHECK)
        (fork,) = await engine.fork_sandbox(sandbox)
        assert isinstance(fork, Sandbox)
        async with fork:
            assert fork.parent
            assert fork.parent.depth == 2
            await sh(fork, CHECK)
        await engine.standby(sandbox)
        await engine.resume(sandbox)
        await counter.assert_counts(sandbox)
        assert sandbox.snapshot_tag == "first"
        await assert_whole(engine, sandbox)


async def test_its_clock_is_right_afterwards(engine: Engine, sandbox: Sandbox) -> None:
    await engine.standby(sandbox)
    await asyncio.sleep(3 * CLOCK_TOLERANCE)
    await engine.resume(sandbox)
    await assert_in_the_present(sandbox)


async def test_branches_before_and_after(engine: Engine) -> None:
    """Each branch has the one before as its parent, whatever the sandbox stood on in between."""
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, WRITE.format("before"))
        first = (await engine.branch(sandbox, "first")).snapshot.manifest
        await sh(sandbox, WRITE.format("between"))
        await engine.standby(sandbox)
        assert sandbox.snapshot_tag == "first"
        await engine.resume(sandbox)
        second = (await engine.branch(sandbox, "second")).snapshot.manifest
        assert second.parent == first.reference
        assert [layer.tag for layer in second.layers] == ["base", "first", sandbox.id, "second"]
        assert [layer.anonymous for layer in second.layers] == [False, False, True, False]
        assert engine.store.info("second").ancestors == ["base", "first"]
        assert engine.store.info("first").dependents == ["second"]

        await engine.standby(sandbox)
        await engine.resume(sandbox)
        assert sandbox.snapshot_tag == "second"
        await engine.delete("first", force=True)
        await sh(sandbox, CHECK)
        await assert_whole(engine, sandbox)
    async with await engine.fork_one("second") as fork:
        await sh(fork, CHECK)
        assert "between" in await sh(fork, "cat /dev/shm/sums")


async def test_its_snapshot_is_deleted_meanwhile(engine: Engine) -> None:
    async with await engine.fork_one("base") as source:
        await sh(source, WRITE.format("origin"))
        await engine.branch(source, "origin")
    async with await engine.fork_one("origin") as sandbox:
        await engine.branch(sandbox, "child")
        await engine.standby(sandbox)
        with pytest.raises(HasDependents):
            await engine.delete("origin")
        await engine.delete("origin", force=True)
        await engine.delete("child")
        await engine.resume(sandbox)
        assert sandbox.snapshot_tag == "child"
        await sh(sandbox, CHECK)
        await assert_whole(engine, sandbox)
        assert engine.store.info("next").ancestors == ["base", "origin", "child"]


async def test_what_cannot_be_done_in_standby_and_what_only_then(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        with pytest.raises(Conflict, match=f"{sandbox.id} is running, not in standby"):
            await engine.resume(sandbox)
        await engine.standby(sandbox)
        for attempt in (
            sandbox.exec(["true"]),
            engine.branch(sandbox, "never"),
            engine.branch(sandbox, "never", "full"),
            engine.begin_branch(sandbox, "never"),
            engine.standby(sandbox),
            engine.reset(sandbox),
        ):
            with pytest.raises(Conflict, match=f"{sandbox.id} is in standby; resume it first"):
                await attempt
        assert sandbox.state == "standby"
        await engine.resume(sandbox)
        assert await sh(sandbox, "echo back") == "back\n"
    for change in (engine.standby, engine.resume, engine.reset):
        with pytest.raises(Conflict, match=f"{sandbox.id} .*killed"):
            await change(sandbox)


async def test_a_command_under_way_is_told_and_its_process_goes_on(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        script = (
            "echo $$ >/root/pid; while [ ! -e /root/stop ]; do sleep 0.05; done; echo >/root/end"
        )
        command = asyncio.create_task(sandbox.exec(["sh", "-c", script]))
        await sh(sandbox, "until [ -s /root/pid ]; do sleep 0.05; done")
        await engine.standby(sandbox)
        with pytest.raises(Conflict, match=f"{sandbox.id} went to standby while it was being used"):
            await command
        await engine.resume(sandbox)
        await sh(sandbox, "test -e /proc/$(cat /root/pid) -a ! -e /root/end; touch /root/stop")
        await sh(sandbox, "until [ -e /root/end ]; do sleep 0.05; done")


async def test_a_command_in_the_background_is_heard_again(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        script = "until [ -e /root/go-on ]; do sleep 0.05; done; echo here I am"
        async with commands.start(sandbox, ["sh", "-c", script], background=True) as command:
            pid = command.pid
        assert pid is not None
        await engine.standby(sandbox)
        await engine.resume(sandbox)
        async with commands.attach(sandbox, pid) as command:
            await sh(sandbox, "touch /root/go-on")
            assert await command.read() == (wire.STDOUT, b"here I am\n")
            assert (await command.wait()).exit_code == 0


async def test_two_at_once(engine: Engine) -> None:
    """One suspends or resumes it, the other is told so."""
    async with await engine.fork_one("base") as sandbox:
        for change in (engine.standby, engine.resume):
            outcomes = await asyncio.gather(
                *(change(sandbox) for _ in range(2)), return_exceptions=True
            )
            (refused,) = (each for each in outcomes if isinstance(each, BaseException))
            assert isinstance(refused, Conflict)
        assert await sh(sandbox, "echo back") == "back\n"
