"""A changed byte is found, and named; an unchanged file costs a `stat`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ratoon.errors import Corrupt, RatoonError
from ratoon.store.disk import qcow2
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot, load_snapshot, read_vmstate
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import read_stamps, verify_disks
from small_snapshots import flip, publish, size, touch


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


@pytest.fixture
def child(store: Store) -> Snapshot:
    base = publish(store, "base")
    return publish(store, "child", parent=publish(store, "middle", parent=base))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The disk layers that were read and hashed, in order."""
    seen: list[Path] = []
    digest_of = qcow2.file_digest

    def spy(path: Path) -> str:
        seen.append(path)
        return digest_of(path)

    monkeypatch.setattr(qcow2, "file_digest", spy)
    return seen


@pytest.mark.parametrize("name", ["manifest.json", "manifest.b3"])
def test_every_flipped_byte_of_the_manifest_is_found(child: Snapshot, name: str) -> None:
    path = child.path / name
    sound = path.read_bytes()
    for offset in range(len(sound)):
        flip(path, offset)
        with pytest.raises(RatoonError, match=r"snapshot child, file .*manifest"):
            load_snapshot(child.path)
        path.write_bytes(sound)
    assert load_snapshot(child.path) == child


@pytest.mark.parametrize("name", ["manifest.json", "manifest.b3"])
def test_a_missing_or_cut_manifest_is_named(child: Snapshot, name: str) -> None:
    path = child.path / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Corrupt, match=r"snapshot child, file .*manifest"):
        load_snapshot(child.path)
    path.unlink()
    with pytest.raises(Corrupt, match=rf"snapshot child, file .*{name}: missing"):
        load_snapshot(child.path)


def test_a_flip_in_the_device_state_is_found(child: Snapshot) -> None:
    sound, state = child.vmstate_path.read_bytes(), read_vmstate(child)
    for offset in range(0, len(sound), 7):
        flip(child.vmstate_path, offset)
        with pytest.raises(Corrupt, match=r"snapshot child, file .*vmstate"):
            read_vmstate(child)
        child.vmstate_path.write_bytes(sound)
    assert read_vmstate(child) == state
    child.vmstate_path.unlink()
    with pytest.raises(Corrupt, match=r"snapshot child, file .*vmstate: missing"):
        read_vmstate(child)


def test_what_was_just_published_is_not_read_again(child: Snapshot, reads: list[Path]) -> None:
    verify_disks(child)
    assert reads == []


@pytest.mark.parametrize(("layer", "tag"), [(0, "base"), (1, "middle"), (2, "child")])
def test_a_flip_in_a_disk_layer_is_found(child: Snapshot, layer: int, tag: str) -> None:
    path = child.disk_path(layer)
    for offset in (0, 100, size(path) // 2, size(path) - 1):
        flip(path, offset)
        with pytest.raises(Corrupt, match=rf"snapshot {tag}, file .*disk.qcow2: its content"):
            verify_disks(child)
        flip(path, offset)
    verify_disks(child)


def test_a_layer_of_another_size_or_none_is_found(child: Snapshot) -> None:
    os.truncate(child.disk_path(1), 100)
    with pytest.raises(Corrupt, match=r"snapshot middle, file .*: 100 bytes, but"):
        verify_disks(child)
    child.disk_path(1).unlink()
    with pytest.raises(Corrupt, match=r"snapshot middle, file .*: missing"):
        verify_disks(child)


def test_a_touched_layer_is_read_once_more(child: Snapshot, reads: list[Path]) -> None:
    touch(child.disk_path(1))
    verify_disks(child)
    verify_disks(child)
    assert reads == [child.disk_path(1)]


@pytest.mark.parametrize(
    "cache", [None, b"", b"\xff", b"[]", b'{"disk.qcow2": 3}', b'{"disk.qcow2": {"device": 1}}']
)
def test_without_a_usable_cache_all_layers_are_read(
    child: Snapshot, reads: list[Path], cache: bytes | None
) -> None:
    if cache is None:
        (child.path / "verified.json").unlink()
    else:
        (child.path / "verified.json").write_bytes(cache)
    verify_disks(child)
    assert reads == [child.disk_path(layer) for layer in range(3)]
    verify_disks(child)
    assert len(reads) == 3


def test_a_damaged_parent_layer_is_not_trusted_by_a_new_child(
    store: Store, child: Snapshot
) -> None:
    flip(child.disk_path(1), 5000)
    grandchild = publish(store, "grandchild", parent=child)
    with pytest.raises(Corrupt, match=r"snapshot middle, file .*ancestry/1/disk.qcow2"):
        verify_disks(grandchild)


def test_a_disk_that_names_another_file_is_refused_despite_its_digest(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = publish(store, "base")
    flip(base.disk_path(0), 8)  # a backing file offset
    recorded = base.manifest.layers[0].disk.digest
    monkeypatch.setattr(qcow2, "file_digest", lambda path: recorded)
    with pytest.raises(RatoonError, match=r"snapshot base, file .*names a backing file"):
        verify_disks(base)


def test_a_twin_is_complete_and_outlives_its_source(
    store: Store, child: Snapshot, reads: list[Path]
) -> None:
    twin = link_snapshot(child, store.sandboxes / "parent")
    assert load_snapshot(twin.path) == twin
    assert read_stamps(twin.path) == read_stamps(child.path)
    vmstate = read_vmstate(child)
    for tag in ("child", "middle", "base"):
        store.delete(tag)
    verify_disks(twin)
    assert reads == []
    assert read_vmstate(twin) == vmstate
    assert [twin.memory_path(layer).stat().st_nlink for layer in range(3)] == [1, 1, 1]


def test_verifying_a_twin_leaves_its_source_alone(store: Store, child: Snapshot) -> None:
    before = (child.path / "verified.json").read_bytes()
    twin = link_snapshot(child, store.sandboxes / "parent")
    touch(twin.disk_path(0))
    verify_disks(twin)
    assert (child.path / "verified.json").read_bytes() == before
    assert (twin.path / "verified.json").read_bytes() != before


def test_a_failed_twin_leaves_nothing(store: Store, child: Snapshot) -> None:
    child.memory_path(0).unlink()
    with pytest.raises(Corrupt, match=r"snapshot child, file .*ancestry/0/memory.bin: missing"):
        link_snapshot(child, store.sandboxes / "parent")
    assert list(store.sandboxes.iterdir()) == []
