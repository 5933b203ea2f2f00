"""What differs between any two snapshots: pages, disk content, files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ratoon.artifacts import Progress, silent
from ratoon.errors import Incompatible, UnreadableDisk
from ratoon.store.disk.compare import changed_bytes
from ratoon.store.disk.ext4 import Ext4
from ratoon.store.disk.flatten import flatten_raw
from ratoon.store.disk.tree import FileChanges, compare_trees, replay_journal
from ratoon.store.memory.chain import resolve
from ratoon.store.memory.digests import digests_differ
from ratoon.store.snapshot.links import ram_pages, read_links
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import verify_disks


@dataclass(frozen=True)
class Difference:
    """From one snapshot to another. Pages are of 4096 bytes; disk bytes are as the guest sees them,
    in whole units of 4096.

    `files` is None where the disks differ but are not file systems that can be read; `no_files` is
    why.
    """

    ram_pages: int
    changed_pages: int
    disk_bytes: int
    changed_disk_bytes: int
    files: FileChanges | None
    no_files: str | None = None


def diff(store: Store, left: str, right: str, progress: Progress = silent) -> Difference:
    """What differs from snapshot `left` to snapshot `right`; blocks.

    The files are those on the disk: what a guest had written, but not yet to its disk, is in its
    memory alone. Needs temporary room in the store for what both disks hold.

    NotFound. Incompatible: machines of different RAM size. Corrupt, ChainMismatch: one of them is
    damaged. HostError: a program is missing or failed.
    """
    one, other = store.get(left), store.get(right)
    if ram_pages(one) != ram_pages(other):
        sizes = " and ".join(
            f"{each.manifest.tag} has {each.manifest.machine.ram_bytes} bytes"
            for each in (one, other)
        )
        raise Incompatible(f"snapshots of different RAM size cannot be compared: {sizes}")
    disk_bytes = max(each.manifest.machine.disk_bytes for each in (one, other))
    with store.scratch() as room:
        # Of its own, so that they may be deleted meanwhile.
        one, other = (
            link_snapshot(each, room / side) for side, each in (("left", one), ("right", other))
        )
        changed_pages = _changed_pages(one, other)
        changed_disk, files, no_files = _compare_disks(one, other, room, progress)
    return Difference(
        ram_pages=ram_pages(one),
        changed_pages=changed_pages,
        disk_bytes=disk_bytes,
        changed_disk_bytes=changed_disk,
        files=files,
        no_files=no_files,
    )


def _changed_pages(one: Snapshot, other: Snapshot) -> int:
    if one.manifest.memory_root == other.manifest.memory_root:
        return 0
    arrays = [resolve(read_links(each), ram_pages(each)) for each in (one, other)]
    return int(np.count_nonzero(digests_differ(*arrays)))


def _compare_disks(
    one: Snapshot, other: Snapshot, room: Path, progress: Progress
) -> tuple[int, FileChanges | None, str | None]:
    for each in (one, other):
        progress(f"checking the disk of {each.manifest.tag}")
        verify_disks(each)
    if one.manifest.disk_root == other.manifest.disk_root:
        return 0, FileChanges((), (), ()), None
    flat = room / "left.raw", room / "right.raw"
    layers = _layers(one), _layers(other)
    for each, below, raw in zip((one, other), layers, flat, strict=True):
        progress(f"flattening the disk of {each.manifest.tag}")
        flatten_raw(below, raw)
    progress("comparing the disks")
    changed = changed_bytes(layers, flat, _shared_layers(one, other))
    progress("comparing the files")
    try:
        return changed, _compare_files(one, other, *flat), None
    except UnreadableDisk as error:
        return changed, None, str(error)


def _layers(snapshot: Snapshot) -> list[Path]:
    return [snapshot.disk_path(number) for number in range(snapshot.depth + 1)]


def _shared_layers(one: Snapshot, other: Snapshot) -> int:
    """How many disk layers, from the base on, are the same: their digests have been checked."""
    count = 0
    for mine, theirs in zip(one.manifest.layers, other.manifest.layers, strict=False):
        if mine.disk != theirs.disk:
            break
        count += 1
    return count


def _compare_files(one: Snapshot, other: Snapshot, left_raw: Path, right_raw: Path) -> FileChanges:
    labels = [f"the disk of snapshot {each.manifest.tag}" for each in (one, other)]
    for raw, label in zip((left_raw, right_raw), labels, strict=True):
        replay_journal(raw, label)
    with Ext4(left_raw, labels[0]) as left, Ext4(right_raw, labels[1]) as right:
        return compare_trees(left, right)
