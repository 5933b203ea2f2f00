"""Snapshots on ext4, xfs and btrfs: names of the same inodes, and copies where that cannot be."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from loop_volumes import Mount, Volume

from ratoon.bench.loop_mounts import KINDS, used_bytes
from ratoon.files import link_or_copy
from ratoon.store.memory.reflink import can_reflink
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import check_sizes, verify_disks
from ratoon.units import MIB
from small_snapshots import publish

pytest_plugins = ["filesystem_fixtures"]
pytestmark = pytest.mark.filesystems

#: Hard links that ext4 gives a file.
EXT4_LINKS = 65_000


@pytest.fixture
def store(place: Path) -> Store:
    return Store.open(place / "home")


def chain_of(store: Store, tags: str) -> list[Snapshot]:
    """Each on the one before."""
    made: list[Snapshot] = []
    for tag in tags.split():
        made.append(publish(store, tag, parent=made[-1] if made else None))
    return made


def assert_whole(store: Store, *tags: str) -> None:
    for tag in tags:
        snapshot = store.get(tag)
        check_sizes(snapshot)
        verify_disks(snapshot)


def test_ancestry_is_hard_links(store: Store) -> None:
    base, middle, head = chain_of(store, "base L1 L2")
    for layer, snapshot in enumerate((base, middle)):
        for ours, theirs in (
            (head.memory_path(layer), snapshot.path / "memory.bin"),
            (head.disk_path(layer), snapshot.path / "disk.qcow2"),
        ):
            assert ours.samefile(theirs)
            assert ours.stat().st_nlink == head.depth + 1 - layer
    assert_whole(Store.open(store.home), "base", "L1", "L2")


def test_what_is_below_may_be_deleted(store: Store) -> None:
    chain_of(store, "base L1 L2")
    for gone in ("base", "L1"):
        store.delete(gone, force=True)
        assert_whole(store, "L2")
    store.delete("L2")
    assert store.list() == ()
    assert list(store.staging.iterdir()) == []
    publish(store, "L2")
    assert_whole(store, "L2")


@pytest.fixture
def file(place: Path) -> Path:
    """16 MiB of which half is a hole."""
    path = place / "file"
    with path.open("wb") as file:
        file.write(os.urandom(4 * MIB))
        file.seek(8 * MIB, os.SEEK_CUR)
        file.write(os.urandom(4 * MIB))
    return path


def assert_copied(source: Path, target: Path) -> None:
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mtime_ns == source.stat().st_mtime_ns
    assert target.stat().st_ino != source.stat().st_ino
    assert target.stat().st_blocks * 512 < 9 * MIB


def test_a_copy_shares_extents_where_it_can(
    volume: Volume, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_many(*_: object) -> None:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))

    before = used_bytes(volume.root)
    monkeypatch.setattr(os, "link", too_many)
    link_or_copy(file, file.with_name("target"))
    assert_copied(file, file.with_name("target"))
    added = used_bytes(volume.root) - before
    if can_reflink(volume.root):
        assert added < MIB
        assert "(Too many links): a reflink shares its extents" in caplog.text
    else:
        assert 8 * MIB <= added < 9 * MIB
        assert "(Too many links): it was copied" in caplog.text


@pytest.fixture(scope="module")
def others(mount: Mount) -> list[Volume]:
    """One more file system of each kind."""
    return [mount(kind, 400 * MIB) for kind in KINDS]


def test_to_another_file_system(
    file: Path, others: list[Volume], caplog: pytest.LogCaptureFixture
) -> None:
    for number, other in enumerate(others):
        target = other.root / file.parent.name
        link_or_copy(file, target)
        assert_copied(file, target)
        assert caplog.messages[number].endswith("(Invalid cross-device link): it was copied")


def test_between_subvolumes_of_btrfs_a_reflink_does(
    mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    """They are one file system to a reflink, and two to a link."""
    root = mount("btrfs", 400 * MIB).root
    source, target = root / "source", root / "sub" / "target"
    make_subvolume(root / "sub")
    source.write_bytes(os.urandom(8 * MIB))
    before = used_bytes(root)
    link_or_copy(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert used_bytes(root) - before < MIB
    assert "(Invalid cross-device link): a reflink shares its extents" in caplog.text


def make_subvolume(path: Path) -> None:
    subprocess.run(["btrfs", "subvolume", "create", path], check=True, capture_output=True)


def test_more_links_than_ext4_can_give(mount: Mount, caplog: pytest.LogCaptureFixture) -> None:
    root = mount("ext4", 64 * MIB).root
    store = Store.open(root / "home")
    base = publish(store, "base")
    layer = base.memory_path(0)
    for number in range(EXT4_LINKS - 1):
        os.link(layer, root / f"{number:x}")
    with pytest.raises(OSError, match="Too many links"):
        os.link(layer, root / "one-too-many")

    head = publish(store, "L1", parent=base)
    assert "(Too many links): it was copied" in caplog.text
    copy = head.memory_path(0)
    assert copy.read_bytes() == layer.read_bytes()
    assert not copy.samefile(layer)
    caplog.clear()
    next_head = publish(store, "L2", parent=head)
    assert next_head.memory_path(0).samefile(copy), "the copy is linked on"
    assert caplog.messages == []
    assert_whole(store, "base", "L1", "L2")
