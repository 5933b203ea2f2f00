"""Forks of a deep chain open one flattened disk, and are like others whatever is done to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from vm_helpers import CHECK, WRITE, assert_whole, leaves_nothing, no_space, sh

from ratoon.engine.sandbox import layer
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.disks import MANY
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import HostError, NotFound
from ratoon.store.check.check import check_store
from ratoon.store.check.findings import Kind
from ratoon.store.check.scrub import Slice

#: So deep that its first fork has the disk flattened.
HEAD = f"link{MANY}"
LOOK = f"{CHECK}; cat /dev/shm/sums /root/last; cd /root; echo *"


@pytest.fixture(scope="module")
async def looks(engine: Engine) -> AsyncIterator[str]:
    """There is a chain of which only the head is left, with its images: how its disk looks."""
    async with await engine.fork_one("base") as sandbox:
        for number in range(1, MANY + 1):
            change = f"rm -f /root/gone*; touch /root/gone{number}; echo {number} >/root/last\n"
            await sh(sandbox, change + WRITE.format(f"file{number}"))
            await engine.branch(sandbox, f"link{number}")
    for number in range(1, MANY):
        await engine.delete(f"link{number}", force=True)
    async with await engine.fork_one(HEAD) as fork:
        assert disk_nodes(fork) == MANY + 1
        looks = await sh(fork, LOOK)
    yield looks
    await engine.settle()
    await engine.delete(HEAD)
    assert not list(engine.store.images.glob("*.qcow2"))


@pytest.fixture(autouse=True)
async def _flattened(engine: Engine, looks: str) -> None:
    """The disk of the head is flattened, also if the test before has removed that."""
    manifest = engine.store.get(HEAD).manifest
    async with await engine.fork_one(HEAD):
        await engine.settle()
    assert (engine.store.images / f"{manifest.disk_root}.qcow2").exists()


def disk_nodes(sandbox: Sandbox) -> int:
    """How many files its machine was started with, for its disk, below the overlay."""
    words = Path(f"/proc/{sandbox.pid}/cmdline").read_bytes().split(b"\0")
    return words.count(b"-blockdev") - 1


def remove_flattened(engine: Engine, tag: str) -> None:
    roots = engine.store.get(tag).manifest.disk_roots
    engine.images.remove(*roots)
    assert not list(engine.store.images.glob("*.qcow2"))


def unused_images(engine: Engine) -> set[Path]:
    """Images that the tests of other modules have left in the store that all share."""
    findings = check_store(engine.store).findings
    return {found.file for found in findings if found.kind is Kind.UNUSED_IMAGE}


async def test_forks_and_what_is_branched_off_them(engine: Engine, looks: str) -> None:
    manifest = engine.store.get(HEAD).manifest
    of_others = await asyncio.to_thread(unused_images, engine)
    async with await engine.fork_one(HEAD) as fork:
        assert disk_nodes(fork) == 2
        assert await sh(fork, LOOK) == looks
        await sh(fork, "rm /root/file1; sed -i '/file1$/d' /dev/shm/sums; rm /dev/shm/file1")
        await sh(fork, WRITE.format("above"))
        above = (await engine.branch(fork, "above")).snapshot
        full = (await engine.branch(fork, "full", mode="full")).snapshot
        expected = await sh(fork, LOOK)
    assert above.manifest.layers[:-1] == manifest.layers
    assert (above.depth, full.depth) == (MANY + 1, 0)
    async with await engine.fork_one("above") as fork:
        assert disk_nodes(fork) == 3
        assert await sh(fork, LOOK) == expected
    remove_flattened(engine, "above")
    report = await asyncio.to_thread(check_store, engine.store, read_data=Slice(1, 1))
    found = {finding.kind for finding in report.findings if finding.file not in of_others}
    assert found == {Kind.PARENT_GONE}
    for tag, nodes in (("above", MANY + 2), ("full", 1)):
        async with await engine.fork_one(tag) as fork:
            assert disk_nodes(fork) == nodes
            assert await sh(fork, LOOK) == expected
    await engine.settle()


async def test_a_sandbox_on_one_that_is_evicted(
    engine: Engine, looks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads on; a branch of it may fail; it can be reset, stand by, and be forked."""
    async with await engine.fork_one(HEAD) as sandbox:
        assert disk_nodes(sandbox) == 2
        remove_flattened(engine, HEAD)
        assert await sh(sandbox, LOOK) == looks
        await sh(sandbox, WRITE.format("lost"))
        with monkeypatch.context() as patch:
            patch.setattr(layer, "file_digest", no_space)
            with pytest.raises(HostError, match="No space left"):
                await engine.branch(sandbox, "failed")
        await sh(sandbox, CHECK)
        await engine.reset(sandbox)
        assert await sh(sandbox, LOOK) == looks
        await engine.settle()
        await engine.reset(sandbox)
        assert disk_nodes(sandbox) == 2
        await sh(sandbox, WRITE.format("kept"))
        await engine.standby(sandbox)
        await engine.resume(sandbox)
        assert disk_nodes(sandbox) == 3
        (fork,) = await engine.fork_sandbox(sandbox)
        assert isinstance(fork, Sandbox)
        async with fork:
            assert disk_nodes(fork) == 4
            assert "kept" in await sh(fork, LOOK)
        await assert_whole(engine, sandbox)


async def test_one_is_taken_over_by_the_next_engine(engine: Engine, looks: str, home: Path) -> None:
    async with Engine.open(home, keep=True) as first:
        sandbox = await first.fork_one(HEAD)
        assert disk_nodes(sandbox) == 2
        await sh(sandbox, WRITE.format("kept"))
    async with Engine.open(home, keep=True) as second, second.get(sandbox.id) as taken:
        assert disk_nodes(taken) == 2
        await second.branch(taken, "taken")
        assert second.store.info("taken").parent_tag == HEAD
        await assert_whole(second, taken)


async def test_links_that_cannot_be_made_while_the_machine_starts(
    engine: Engine, looks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deleted(*arguments: object) -> None:
        raise NotFound("snapshot was deleted meanwhile")

    with leaves_nothing(engine), monkeypatch.context() as patch:
        patch.setattr(SandboxDirectory, "stand_on", deleted)
        with pytest.raises(NotFound, match="deleted meanwhile"):
            await engine.fork_one(HEAD)
