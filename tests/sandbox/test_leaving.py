"""What was made of a sandbox's own states, and of what was deleted, goes when it leaves that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ratoon.engine.sandbox.background_builds import BackgroundBuilds
from ratoon.engine.sandbox.disks import MANY, DiskChooser
from ratoon.engine.sandbox.leaving import Leaving
from ratoon.engine.sandbox.memory_images import MemoryImages
from ratoon.store.memory.image import ImageStore
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot
from ratoon.store.snapshot.store import Store
from small_snapshots import publish, write_snapshot


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
async def disks(store: Store) -> AsyncIterator[DiskChooser]:
    disks = DiskChooser(store)
    yield disks
    await disks.settle()


@pytest.fixture
async def memory_images(store: Store) -> AsyncIterator[MemoryImages]:
    memory_images = MemoryImages(ImageStore(store.images))
    yield memory_images
    await memory_images.settle()


@pytest.fixture
def leaving(store: Store, memory_images: MemoryImages, disks: DiskChooser) -> Leaving:
    return Leaving(store, memory_images, disks)


def chain(store: Store) -> list[Snapshot]:
    """So many that a first fork has their disks flattened."""
    snapshots: list[Snapshot] = []
    for number in range(MANY + 1):
        snapshots.append(
            publish(store, f"s{number}", {number: 1}, snapshots[-1] if number else None)
        )
    return snapshots


async def flatten(disks: DiskChooser, snapshot: Snapshot) -> None:
    disks.expect_many(snapshot)
    disks.hold(snapshot).close()
    await disks.settle()


def images(store: Store) -> set[str]:
    return {path.stem for path in store.images.glob("[!.]*.*")}


async def test_what_a_sandbox_alone_had(store: Store, disks: DiskChooser, leaving: Leaving) -> None:
    published = chain(store)[-1]
    own = [published]
    for number in range(3):
        target = store.sandboxes / f"own{number}"
        with store.stage(f"own{number}") as staging:
            manifest = write_snapshot(store, staging, {60 + number: 1}, own[-1], anonymous=True)
            published_aside = staging.publish(manifest)
            published_aside.path.rename(target)
            own.append(Snapshot(target, manifest))
    for each in (published, own[3]):
        await flatten(disks, each)
    roots = own[3].manifest.disk_roots
    present = {roots[-4], roots[-1]}
    assert images(store) == present
    await leaving.leave(own[2], keep=(own[3], published))
    await leaving.leave(published, keep=(own[1],))
    assert images(store) == present
    await leaving.leave(own[3], published)
    assert images(store) == {roots[-4]}
    await leaving.leave(published)
    assert images(store) == {roots[-4]}


async def test_what_was_deleted_meanwhile(
    store: Store, disks: DiskChooser, memory_images: MemoryImages, leaving: Leaving
) -> None:
    """Images were made of the twin; those that another snapshot has stay."""
    *_, below, head = chain(store)
    twin = link_snapshot(head, store.sandboxes / "twin")
    store.delete("s6")
    assert head.manifest.tag == "s6"
    await memory_images.make_image(twin)
    await flatten(disks, twin)
    await memory_images.make_image(below)
    await flatten(disks, below)
    assert len(images(store)) == 4
    with store.stage("s6") as staging:  # the same tag is not the same snapshot
        staging.publish(write_snapshot(store, staging, {50: 1}, below))
    await leaving.leave(twin, keep=(below,))
    assert images(store) == {below.manifest.memory_root, below.manifest.disk_root}
    await leaving.leave(below, twin)
    assert images(store) == {below.manifest.memory_root, below.manifest.disk_root}


async def test_what_was_made_just_now() -> None:
    """Its task has ended, but whoever waits for that has not been told."""
    removed: list[str] = []
    leaving: list[asyncio.Task[None]] = []
    making: BackgroundBuilds[None] = BackgroundBuilds(lambda *roots: removed.extend(roots))

    async def make() -> None:
        leaving.append(asyncio.create_task(making.remove("root")))

    await making.begin("root", make)
    await leaving[0]
    assert removed == ["root"]
