"""A standby, resume or reset that fails, or whose sandbox is killed meanwhile, at any step."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from vm_helpers import (
    CHECK,
    FOR_EVER,
    WRITE,
    Counter,
    assert_whole,
    leaves_nothing,
    no_space,
    sh,
)

from ratoon import paths
from ratoon.engine.sandbox import capture, layer, memory_images, standby, start
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import HostError, MachineDied, RatoonError
from ratoon.machine.guest.channel import Channel
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.memory import writing
from ratoon.store.snapshot.staging import Staging


@pytest.fixture
async def source(engine: Engine) -> AsyncIterator[Sandbox]:
    async with await engine.fork_one("base") as sandbox:
        await sh(sandbox, WRITE.format("before"))
        yield sandbox


def files_of(engine: Engine, sandbox: Sandbox) -> set[Path]:
    """All that it has in the store and among the sockets."""
    places = sandbox.directory.path, paths.runtime(engine.store.home) / sandbox.id
    return {path for place in places for path in place.rglob("*")}


def write_half(fd: int, data: memoryview, offset: int) -> None:
    """The disk becomes full in the middle of a file."""
    os.pwrite(fd, data[: len(data) // 2], offset)
    no_space()


STANDBY: list[tuple[Any, str, Callable[..., Any]]] = [
    (standby, "reserve", no_space),
    (QemuMachine, "pause", no_space),
    (QemuMachine, "save_state", no_space),
    (capture, "dirty_pages", no_space),
    (capture, "read_into", no_space),
    (writing, "write_at", write_half),
    (layer, "file_digest", no_space),
    (Staging, "adopt_ancestry", no_space),
    (Staging, "publish", no_space),
    (Sandbox, "become", no_space),
]


async def test_a_standby_that_fails_leaves_it_running(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = await Counter.begin(source)
    before = files_of(engine, source)
    for owner, name, failure in STANDBY:
        with leaves_nothing(engine), monkeypatch.context() as patch:
            patch.setattr(owner, name, failure)
            with pytest.raises(HostError, match="No space left"):
                await engine.standby(source)
        assert source.state == "running", name
        assert files_of(engine, source) == before, name
        assert await sh(source, "echo runs") == "runs\n"
    assert source.snapshot_tag == "base"
    await counter.assert_counts(source)
    await engine.standby(source)
    await engine.resume(source)
    await counter.assert_counts(source)
    await assert_whole(engine, source)


async def test_a_standby_that_is_cancelled_is_complete(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, cancelled = threading.Event(), threading.Event()
    write = writing.writing_page_set

    def dawdle(*arguments: Any) -> Any:
        reached.set()
        cancelled.wait(FOR_EVER)
        return write(*arguments)

    monkeypatch.setattr(layer, "writing_page_set", dawdle)
    suspending = asyncio.create_task(engine.standby(source))
    await asyncio.to_thread(reached.wait, FOR_EVER)
    suspending.cancel()
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await suspending
    assert source.state == "standby"
    await engine.resume(source)
    await sh(source, CHECK)


def dying(method: Callable[..., Any]) -> Callable[..., Any]:
    """The machine is killed where this is asked of it."""

    async def die(machine: QemuMachine, *arguments: Any) -> Any:
        os.kill(machine.pid, signal.SIGKILL)
        return await method(machine, *arguments)

    return die


def failing_patch(pid: int, *rest: Any) -> None:
    os.kill(pid, signal.SIGKILL)
    write_patch(pid, *rest)


async def no_rebirth(channel: Channel, *arguments: Any, **options: Any) -> None:
    channel.close()
    await rebirth(channel, *arguments, **options)


write_patch, rebirth = memory_images.write_patch, Channel.rebirth

START: list[tuple[Any, str, Callable[..., Any]]] = [
    (start, "write_patch", failing_patch),
    (QemuMachine, "load_state", dying(QemuMachine.load_state)),
    (QemuMachine, "resume", dying(QemuMachine.resume)),
    (Channel, "rebirth", no_rebirth),
    (Sandbox, "become", no_space),
]
FAILED = r"died|gone|closed|No space left"


async def test_a_resume_that_fails_leaves_it_in_standby(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = await Counter.begin(source)
    await engine.standby(source)
    before = files_of(engine, source)
    for owner, name, failure in START:
        with leaves_nothing(engine), monkeypatch.context() as patch:
            patch.setattr(owner, name, failure)
            with pytest.raises(RatoonError, match=FAILED):
                await engine.resume(source)
        assert source.state == "standby", name
        assert files_of(engine, source) == before, name
    await engine.resume(source)
    await counter.assert_counts(source)
    await assert_whole(engine, source)


async def test_a_reset_that_fails_leaves_it_as_it_was(
    engine: Engine, source: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engine.branch(source, "stood-on")
    counter = await Counter.begin(source)
    before = files_of(engine, source)
    for owner, name, failure in START:
        with leaves_nothing(engine), monkeypatch.context() as patch:
            patch.setattr(owner, name, failure)
            with pytest.raises(RatoonError, match=FAILED):
                await engine.reset(source)
        assert source.state == "running", name
        assert files_of(engine, source) == before, name
        assert await sh(source, "echo runs") == "runs\n"
    await counter.assert_counts(source)
    await assert_whole(engine, source)


async def test_a_dead_one_cannot_go_to_standby(engine: Engine, source: Sandbox) -> None:
    os.kill(source.pid, signal.SIGKILL)
    with pytest.raises(MachineDied, match=r"gone|died"):
        await engine.standby(source)
    assert not any(path.name.startswith("standby") for path in files_of(engine, source))


# Killed meanwhile -----------------------------------------------------------------------------


KILLED_IN: list[tuple[str, Any, str]] = [
    ("standby", capture, "read_into"),
    ("standby", layer, "writing_page_set"),
    ("standby", layer, "disk_root"),
    ("resume", start, "verify_disks"),
    ("resume", start, "write_patch"),
    ("reset", start, "write_patch"),
]


@pytest.mark.parametrize(
    ("change", "module", "name"),
    KILLED_IN,
    ids=[f"{change}-{name}" for change, _, name in KILLED_IN],
)
async def test_killed_meanwhile(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, change: str, module: Any, name: str
) -> None:
    loop = asyncio.get_running_loop()
    original: Callable[..., Any] = getattr(module, name)
    killing: list[Future[None]] = []

    def kill_first(*arguments: Any) -> Any:
        killing.append(asyncio.run_coroutine_threadsafe(doomed.kill(), loop))
        asyncio.run_coroutine_threadsafe(until_killed(), loop).result(FOR_EVER)
        return original(*arguments)

    async def until_killed() -> None:
        while doomed.state != "killed":
            await asyncio.sleep(0.001)

    with leaves_nothing(engine):
        doomed = await engine.fork_one("base")
        sockets = paths.runtime(engine.store.home) / doomed.id
        await sh(doomed, WRITE.format("before"))
        if change == "resume":
            await engine.standby(doomed)
        if change == "reset":  # to what has no image
            await engine.branch(doomed, "stood-on")
            await engine.delete("stood-on")
        monkeypatch.setattr(module, name, kill_first)
        changed: Awaitable[Any] = getattr(engine, change)(doomed)
        outcomes = await asyncio.gather(changed, return_exceptions=True)
        await asyncio.wrap_future(killing[0])
        monkeypatch.undo()
        assert not isinstance(outcomes[0], BaseException) or isinstance(outcomes[0], RatoonError)
        assert doomed not in engine.sandboxes
        assert not doomed.directory.path.exists()
        assert not sockets.exists()
