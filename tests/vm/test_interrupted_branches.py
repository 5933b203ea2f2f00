"""A branch that is cancelled, or whose sandbox dies or is killed, at any moment of it."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from vm_helpers import FOR_EVER, WRITE, assert_whole, leaves_nothing, sh, tags

from ratoon.engine.sandbox import branch, capture, layer
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import MachineError
from ratoon.machine.vmm.qemu import QemuMachine


@pytest.fixture
async def source(engine: Engine) -> AsyncIterator[Sandbox]:
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, WRITE.format("before"))
        yield sandbox


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (capture, "dirty_pages"),
        (capture, "read_into"),
        (layer, "writing_page_set"),
        (layer, "file_digest"),
    ],
)
async def test_cancelled_while_a_thread_is_at(
    engine: Engine,
    source: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
) -> None:
    reached = threading.Event()
    cancelled = threading.Event()
    original: Callable[..., Any] = getattr(module, name)

    def dawdle(*arguments: Any) -> Any:
        reached.set()
        cancelled.wait(1)
        return original(*arguments)

    monkeypatch.setattr(module, name, dawdle)
    branching = asyncio.create_task(engine.branch(source, "cancelled"))
    await asyncio.to_thread(reached.wait, FOR_EVER)
    branching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await branching
    monkeypatch.undo()
    await sh(source, WRITE.format("between"))
    await assert_whole(engine, source)


COMMANDS = ["blockdev-add", "stop", "xen-save-devices-state", "blockdev-snapshot", "cont"]


@pytest.mark.parametrize("command", COMMANDS)
async def test_cancelled_when_qemu_has_done(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    execute = QemuMachine._execute

    async def then_cancel(machine: QemuMachine, name: str, **arguments: Any) -> Any:
        task = asyncio.ensure_future(execute(machine, name, **arguments))
        if name == command:
            await asyncio.wait({task})
            branching.cancel()
        return await task

    monkeypatch.setattr(QemuMachine, "_execute", then_cancel)
    branching = asyncio.create_task(engine.branch(source, "cancelled"))
    with pytest.raises(asyncio.CancelledError):
        await branching
    monkeypatch.undo()
    await sh(source, WRITE.format("between"))
    await assert_whole(engine, source)


@pytest.mark.parametrize("op", ["freeze", "thaw"])
async def test_cancelled_while_the_guest_is_asked_to(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    request = source.channel.request

    async def then_cancel(asked: str, *, timeout: float, **fields: Any) -> Any:
        reply = await request(asked, timeout=timeout, **fields)
        if asked == op:
            branching.cancel()
            await asyncio.sleep(0)
        return reply

    monkeypatch.setattr(source.channel, "request", then_cancel)
    branching = asyncio.create_task(engine.branch(source, "cancelled"))
    with pytest.raises(asyncio.CancelledError):
        await branching
    monkeypatch.undo()
    await sh(source, WRITE.format("between"))
    await assert_whole(engine, source)


async def test_qemu_dies_in_the_pause(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def die(machine: QemuMachine) -> bytes:
        os.kill(machine.pid, 9)
        return await save_state(machine)

    save_state = QemuMachine.save_state
    monkeypatch.setattr(QemuMachine, "save_state", die)
    with leaves_nothing(engine):
        async with await engine.fork_one("base") as doomed:
            with pytest.raises(MachineError, match="died"):
                await engine.branch(doomed, "lost")


@pytest.mark.parametrize(
    ("module", "name"),
    [(capture, "read_into"), (layer, "writing_page_set"), (layer, "disk_root")],
)
async def test_killed_meanwhile(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    loop = asyncio.get_running_loop()
    original: Callable[..., Any] = getattr(module, name)
    killing: list[Future[None]] = []

    def kill_first(*arguments: Any) -> Any:
        killing.append(asyncio.run_coroutine_threadsafe(doomed.kill(), loop))
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
        return original(*arguments)

    doomed = await engine.fork_one("base")
    pid = doomed.pid
    monkeypatch.setattr(module, name, kill_first)
    outcome = (await asyncio.gather(engine.branch(doomed, "late"), return_exceptions=True))[0]
    await asyncio.wrap_future(killing[0])
    assert doomed not in engine.sandboxes
    assert not doomed.directory.path.exists()
    if isinstance(outcome, branch.Branched):
        async with await engine.fork_one("late") as fork:
            assert await sh(fork, "echo whole") == "whole\n"
    else:
        assert isinstance(outcome, MachineError)
        assert "late" not in tags(engine)
