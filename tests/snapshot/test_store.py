"""Publishing is atomic and durable, and deleting breaks nothing else."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ratoon import files
from ratoon.api.snapshots import SnapshotDetail
from ratoon.errors import (
    AlreadyExists,
    ChainMismatch,
    Corrupt,
    HasDependents,
    Incompatible,
    InFlight,
    NotFound,
)
from ratoon.store.snapshot.manifest import Manifest
from ratoon.store.snapshot.snapshot import Snapshot, load_snapshot, read_vmstate
from ratoon.store.snapshot.store import BrokenSnapshot, Store
from ratoon.store.snapshot.verify import verify_disks
from small_snapshots import flip, publish, write_snapshot


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


def tags(store: Store) -> list[str]:
    return [found.manifest.tag for found in store.list() if isinstance(found, Snapshot)]


def test_a_new_store_is_private_and_can_be_opened_again(store: Store) -> None:
    for path in (store.home, *(p for p in store.home.iterdir() if p.is_dir())):
        assert path.stat().st_mode & 0o777 == 0o700
    assert Store.open(store.home).list() == ()


def test_a_store_of_another_format_is_not_touched(store: Store) -> None:
    (store.home / "store.json").write_text('{"format": 2}')
    with pytest.raises(Incompatible, match=r"store.json: format 2, .* format 1"):
        Store.open(store.home)
    (store.home / "store.json").write_text("garbage")
    with pytest.raises(Corrupt, match=r"store.json"):
        Store.open(store.home)


def test_what_was_published_can_be_read_back(store: Store) -> None:
    base = publish(store, "base")
    child = publish(store, "child", parent=base)
    assert store.get("child") == child
    assert child.depth == 1
    assert child.memory_path(0).samefile(base.memory_path(0))
    assert child.disk_path(0).samefile(base.disk_path(0))
    assert child.path.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in child.path.iterdir()} == {
        *("manifest.json", "manifest.b3", "verified.json"),
        *("memory.bin", "vmstate", "disk.qcow2", "ancestry"),
    }
    assert list(store.staging.iterdir()) == []


def test_no_layer_outside_the_chain(store: Store) -> None:
    base = publish(store, "base")
    for layer in (-1, 1):
        with pytest.raises(IndexError):
            base.memory_path(layer)


def test_everything_new_is_flushed_before_the_rename(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = publish(store, "base")
    flushed: list[Path] = []
    with store.stage("child") as staging:
        manifest = write_snapshot(store, staging, parent=base)
        monkeypatch.setattr(files, "fsync_path", flushed.append)
        staging.publish(manifest)
    own = ("manifest.json", "manifest.b3", "verified.json", "memory.bin", "vmstate", "disk.qcow2")
    expected = {staging.path / name for name in (*own, "", "ancestry", "ancestry/0")}
    assert set(flushed[:-2]) == expected
    assert flushed[-2:] == [store.snapshots, store.staging]


def test_leaving_without_publishing_leaves_nothing(store: Store) -> None:
    with store.stage("t") as staging:
        write_snapshot(store, staging)
    assert not staging.path.exists()
    with pytest.raises(ZeroDivisionError), store.stage("t") as staging:
        _ = 1 / 0
    assert not staging.path.exists()
    assert store.list() == ()


def test_a_tag_is_made_once(store: Store) -> None:
    with store.stage("t"), pytest.raises(InFlight, match="snapshot t"), store.stage("t"):
        pass
    first = publish(store, "t")
    with pytest.raises(AlreadyExists, match="snapshot t"), store.stage("t"):
        pass
    assert store.get("t") == first


def test_publishing_never_replaces(store: Store) -> None:
    with store.stage("t") as staging:
        manifest = write_snapshot(store, staging)
        (store.snapshots / "t").mkdir()
        with pytest.raises(AlreadyExists, match="snapshot t"):
            staging.publish(manifest)
        (store.snapshots / "t" / "file").touch()
        with pytest.raises(AlreadyExists, match="snapshot t"):
            staging.publish(manifest)
    assert (store.snapshots / "t" / "file").exists()


@pytest.mark.parametrize("name", ["memory.bin", "vmstate", "disk.qcow2", "ancestry/0/memory.bin"])
def test_an_incomplete_snapshot_is_not_published(store: Store, name: str) -> None:
    base = publish(store, "base")
    with store.stage("t") as staging:
        manifest = write_snapshot(store, staging, parent=base)
        (staging.path / name).unlink()
        with pytest.raises(Corrupt, match=f"{name}: missing"):
            staging.publish(manifest)
    assert tags(store) == ["base"]


def test_a_full_disk_leaves_the_store_as_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with store.stage("t") as staging:
        manifest = write_snapshot(store, staging)
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            staging.publish(manifest)
    assert store.list() == ()
    assert list(store.staging.iterdir()) == []


def test_a_leftover_does_not_block_its_tag(store: Store) -> None:
    (store.staging / "t" / "ancestry").mkdir(parents=True)
    assert publish(store, "t") == store.get("t")


def test_deleting_a_parent_keeps_the_child_whole(store: Store) -> None:
    base = publish(store, "base")
    content = base.memory_path(0).read_bytes()
    child = publish(store, "child", parent=base)
    with pytest.raises(HasDependents, match="child"):
        store.delete("base")
    store.delete("base", force=True)
    assert tags(store) == ["child"]
    assert child.memory_path(0).read_bytes() == content
    verify_disks(load_snapshot(child.path))
    read_vmstate(child)
    grandchild = publish(store, "grandchild", parent=child)
    assert grandchild.memory_path(0).read_bytes() == content
    assert list(store.staging.iterdir()) == []


def test_dependents_are_those_of_this_snapshot_not_of_its_tag(store: Store) -> None:
    base = publish(store, "base")
    child = publish(store, "child", parent=base)
    publish(store, "sibling", parent=base)
    publish(store, "grandchild", parent=child)
    assert store.dependents("base") == ("child", "sibling")
    assert store.dependents("grandchild") == ()
    store.delete("base", force=True)
    publish(store, "base")
    assert store.dependents("base") == ()
    store.delete("base")


def test_a_damaged_snapshot_hides_no_other_and_can_be_deleted(store: Store) -> None:
    base = publish(store, "base")
    publish(store, "child", parent=base)
    flip(base.path / "manifest.json", 50)
    broken, sound = store.list()
    assert isinstance(broken, BrokenSnapshot)
    assert broken.tag == "base"
    assert "snapshot base" in str(broken.error)
    assert isinstance(sound, Snapshot)
    with pytest.raises(HasDependents):
        store.delete("base")
    store.delete("base", force=True)
    assert tags(store) == ["child"]


def test_an_unknown_tag_is_not_found(store: Store) -> None:
    for use in (store.get, store.delete, store.info, store.dependents):
        with pytest.raises(NotFound, match="no snapshot nobody; `ratoon images` lists"):
            use("nobody")


def test_a_snapshot_under_another_name_is_refused(store: Store) -> None:
    publish(store, "t").path.rename(store.snapshots / "u")
    with pytest.raises(Corrupt, match="snapshot u: its manifest says that it is snapshot t"):
        store.get("u")


def test_a_snapshot_being_published_is_not_deleted(store: Store) -> None:
    with store.stage("t") as staging:
        staging.publish(write_snapshot(store, staging))
        with pytest.raises(InFlight, match="snapshot t"):
            store.delete("t")
    store.delete("t")


def test_a_chain_that_does_not_fit_is_named(store: Store) -> None:
    base = publish(store, "base")
    with store.stage("t") as staging:
        fields = dict(write_snapshot(store, staging, parent=base))
        fields["parent"] = base_ref = fields["parent"].model_copy(update={"memory_root": "e" * 64})
        with pytest.raises(ChainMismatch) as caught:
            Manifest(**fields)
    assert caught.value.expected == base_ref.memory_root
    assert caught.value.found == base.manifest.memory_root


def test_adopting_a_parent_deleted_meanwhile_says_so(store: Store) -> None:
    base = publish(store, "base")
    shutil.rmtree(base.path)
    with store.stage("t") as staging, pytest.raises(NotFound, match="snapshot base was deleted"):
        staging.adopt_ancestry(base)


def test_the_detail_of_a_snapshot(store: Store) -> None:
    base = publish(store, "base")
    child = publish(store, "child", parent=publish(store, "middle", parent=base))
    assert store.info("base").dependents == ["middle"]
    memory = child.memory_path(2).stat()
    middle = child.manifest.layers[1]
    assert store.info("child") == SnapshotDetail(
        tag="child",
        dir=str(store.snapshots / "child"),
        created_at_unix=1_700_000_000,
        memory_logical_bytes=memory.st_size,
        memory_physical_bytes=memory.st_blocks * 512,
        vmstate_bytes=child.vmstate_path.stat().st_size,
        parent_tag="middle",
        parent_content_hash=f"blake3:{middle.memory_root}",
        chain_depth=2,
        ancestors=["base", "middle"],
        dependents=[],
    )
