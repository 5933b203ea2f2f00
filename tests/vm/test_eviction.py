"""Images evicted under real machines: before they start, while they run, and while others start."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest
from vm_helpers import sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import HostError
from ratoon.machine.vmm.driver import Launch
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.disk.qcow2 import OverlayTemplates

#: Something that takes memory, and its checksum.
NOTE = "head -c 4194304 /dev/urandom >/dev/shm/note; cd /; sha256sum dev/shm/note >/dev/shm/sum"
CHECK = "cd /; sha256sum --quiet -c dev/shm/sum"


def images(engine: Engine) -> list[Path]:
    return sorted(engine.images.directory.glob("*.ram"))


async def test_evicted_between_the_choice_and_the_start(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file without a name cannot be mounted: the image is made anew."""
    start, started = QemuMachine.start, []

    async def evict_and_start(launch: Launch) -> QemuMachine:
        started.append(launch)
        if len(started) < 3:
            for image in images(engine):
                engine.images.remove(image.stem)
        return await start(launch)

    with monkeypatch.context() as patch:
        patch.setattr(QemuMachine, "start", evict_and_start)
        sandbox = await engine.fork_one("base")
    assert len(started) == 3
    async with sandbox:
        for image in images(engine):
            engine.images.remove(image.stem)
        await sh(sandbox, NOTE)
        await engine.branch(sandbox, "branched")
        await sh(sandbox, CHECK)
        async with await engine.fork_one("branched") as fork:
            await sh(fork, CHECK)


async def test_evicted_and_made_again_under_running_forks(engine: Engine) -> None:
    async with await engine.fork_one("base") as first:
        await sh(first, NOTE)
        engine.evict_image("base")
        outcomes = await engine.fork("base", 3)
        burst = [fork for fork in outcomes if isinstance(fork, Sandbox)]
        try:
            assert len(burst) == len(outcomes)
            assert len({fork.memory.inode for fork in burst}) == 1
            assert burst[0].memory.inode != first.memory.inode
            engine.evict_image("base")
            await asyncio.gather(*(sh(fork, NOTE) for fork in burst))
            await engine.branch(first, "first")
            await engine.branch(burst[0], "second")
            await asyncio.gather(*(sh(fork, CHECK) for fork in (first, *burst)))
        finally:
            await asyncio.gather(*(fork.kill() for fork in burst))
        for tag in ("first", "second"):
            async with await engine.fork_one(tag) as fork:
                await sh(fork, CHECK)


async def test_a_budget_for_one_image_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads are forked in turn, each time in a burst, and evict each other's image."""
    async with await engine.fork_one("base") as source:
        await sh(source, NOTE)
        await engine.branch(source, "other")
    monkeypatch.setattr(engine.images, "budget", 1)
    engine.evict_image("base")  # so that the first burst makes one, and whatever else is there goes
    for _ in range(2):
        for tag in ("base", "other"):
            outcomes = await engine.fork(tag, 3)
            forks = [fork for fork in outcomes if isinstance(fork, Sandbox)]
            if tag == "other":
                await asyncio.gather(*(sh(fork, CHECK) for fork in forks))
            await asyncio.gather(*(fork.kill() for fork in forks))
            assert len(forks) == len(outcomes), outcomes
            root = engine.store.get(tag).manifest.memory_root
            taking = [image.root for image in engine.images.cached() if image.allocated_bytes]
            assert taking == [root]


async def test_forks_on_a_full_disk_fail_one_by_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: OverlayTemplates, path: Path, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(OverlayTemplates, "create", full)
        outcomes = await engine.fork("base", 2)
    for outcome in outcomes:
        assert isinstance(outcome, HostError)
        assert "snapshot base was not forked: " in str(outcome)
        assert "disk.qcow2: No space left on device; free some space there" in str(outcome)
    assert [*engine.store.sandboxes.iterdir()] == []
