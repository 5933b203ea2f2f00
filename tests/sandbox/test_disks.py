"""Which files a machine opens for its disk, and when a disk is flattened."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from disk_tools import looked_for_again
from ratoon.engine.sandbox.disks import FEW, MANY, DiskChooser
from ratoon.store.disk.flatten import merge
from ratoon.store.memory.cache import DISK
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from small_snapshots import publish, write_snapshot

DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
async def disks(store: Store) -> AsyncIterator[DiskChooser]:
    disks = DiskChooser(store)
    yield disks
    await disks.settle()


def chain(store: Store, files: int) -> list[Snapshot]:
    """Snapshots, each on the one before: a fork of the last has to open so many disk layers."""
    snapshots: list[Snapshot] = []
    for number in range(files):
        snapshots.append(
            publish(store, f"s{number}", {number: 1}, snapshots[-1] if number else None)
        )
    return snapshots


async def fork(disks: DiskChooser, snapshot: Snapshot) -> list[str]:
    """What a fork opens, by name, once what it has begun in the background is done."""
    disk = disks.hold(snapshot)
    paths = disk.paths(snapshot)
    assert disk.is_whole(snapshot) == all(path.parent == DESCRIPTORS for path in paths)
    paths = tuple(path.readlink() if path.parent == DESCRIPTORS else path for path in paths)
    disk.close()
    await disks.settle()
    return [str(path).removeprefix(f"{snapshot.path}/").rpartition("images/")[2] for path in paths]


def layers(first: int, head: Snapshot) -> list[str]:
    names = [f"ancestry/{number}/disk.qcow2" for number in range(first, head.depth)]
    return [*names, "disk.qcow2"]


def flat(head: Snapshot) -> str:
    return f"{head.manifest.disk_root}{DISK}"


async def test_few_layers_are_opened_as_they_are(store: Store, disks: DiskChooser) -> None:
    head = chain(store, FEW)[-1]
    for _ in range(2):
        assert await fork(disks, head) == layers(0, head)
    disks.expect_many(head)
    assert await fork(disks, head) == layers(0, head)
    assert not list(store.images.iterdir())


async def test_the_second_fork_has_it_made_and_the_third_opens_it(
    store: Store, disks: DiskChooser
) -> None:
    head = chain(store, FEW + 1)[-1]
    assert await fork(disks, head) == layers(0, head)
    assert not list(store.images.iterdir())
    assert await fork(disks, head) == layers(0, head)
    assert await fork(disks, head) == ["ancestry/0/disk.qcow2", flat(head)]


@pytest.mark.parametrize(("files", "many"), [(FEW + 1, True), (MANY + 1, False)])
async def test_many_forks_or_many_layers_have_it_made_at_once(
    store: Store, disks: DiskChooser, files: int, many: bool
) -> None:
    head = chain(store, files)[-1]
    if many:
        disks.expect_many(head)
    assert await fork(disks, head) == layers(0, head)
    assert await fork(disks, head) == ["ancestry/0/disk.qcow2", flat(head)]


async def test_a_new_head_opens_that_of_its_beginning(store: Store, disks: DiskChooser) -> None:
    snapshots = chain(store, MANY + 1 + FEW)
    await fork(disks, snapshots[MANY])
    for head in snapshots[MANY:]:
        expected = ["ancestry/0/disk.qcow2", flat(snapshots[MANY]), *layers(MANY + 1, head)]
        if head is snapshots[MANY]:
            expected.pop()
        assert await fork(disks, head) == expected


async def test_a_new_head_that_is_forked_again_gets_its_own(
    store: Store, disks: DiskChooser
) -> None:
    before, head = chain(store, MANY + 2)[-2:]
    await fork(disks, before)
    for _ in range(2):
        assert await fork(disks, head) == ["ancestry/0/disk.qcow2", flat(before), "disk.qcow2"]
    assert await fork(disks, head) == ["ancestry/0/disk.qcow2", flat(head)]


async def test_nobody_waits_for_one_and_it_is_not_made_of_what_is_deleted(
    store: Store, disks: DiskChooser, caplog: pytest.LogCaptureFixture
) -> None:
    head = chain(store, FEW + 1)[-1]
    held = [disks.hold(head) for _ in range(50)]
    assert [disk.descriptors for disk in held] == [()] * 50
    store.delete(head.manifest.tag)
    with caplog.at_level(logging.INFO):
        await disks.settle()
    (message,) = (record.message for record in caplog.records if "flattened" in record.message)
    gone = f"snapshot {head.manifest.tag} was deleted meanwhile"
    assert message == f"{gone}, so its disk was not flattened"
    assert not list(store.images.glob("*.qcow2"))
    assert not list(store.staging.iterdir())


async def test_a_failure_is_told_and_tried_again(
    store: Store,
    disks: DiskChooser,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = chain(store, FEW + 1)[-1]
    with monkeypatch.context() as patch, looked_for_again():
        patch.setenv("PATH", "/nowhere")
        disks.expect_many(head)
        await fork(disks, head)
    assert f"the disk of snapshot {head.manifest.tag} was not flattened: " in caplog.text
    assert not list(store.images.glob("[!.]*"))
    await fork(disks, head)
    assert await fork(disks, head) == ["ancestry/0/disk.qcow2", flat(head)]


async def test_what_is_made_while_its_sandbox_leaves_it_goes_too(
    store: Store, disks: DiskChooser, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = chain(store, FEW + 1)[-1]
    with store.stage("own") as staging:
        own = staging.publish(write_snapshot(store, staging, {60: 1}, head, anonymous=True))
    begun, may_end = threading.Event(), threading.Event()
    waited: list[bool] = []

    def slowly(*arguments: Any) -> None:
        begun.set()
        waited.append(may_end.wait(300))
        merge(*arguments)

    monkeypatch.setattr("ratoon.store.snapshot.flat_disks.merge", slowly)
    disks.expect_many(own)
    disks.hold(own).close()
    assert await asyncio.to_thread(begun.wait, 300)
    await disks.remove(*own.manifest.disk_roots)
    may_end.set()
    await disks.settle()
    assert waited == [True], "who left waited for what is made"
    assert not list(store.images.glob("*.qcow2"))
    disks.expect_many(own)
    assert await fork(disks, own) == layers(0, own)
    assert await fork(disks, own) == ["ancestry/0/disk.qcow2", flat(own)]
