"""Repair does what is provably safe, and nothing else."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from ratoon import files
from ratoon.store.check import restore as restore_module
from ratoon.store.check.check import check_store
from ratoon.store.check.findings import Kind, Report
from ratoon.store.check.repair import Outcome, plan_repairs, repair_store
from ratoon.store.check.scrub import EVERYTHING
from ratoon.store.memory.pageset import read_index
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot
from ratoon.store.snapshot.store import Store
from small_snapshots import flip, make_image, poke, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def head(store: Store) -> Snapshot:
    """base ← middle ← head; no images."""
    base = publish(store, "base", {0: 1, 5: 2, 9: 3, 200: 4})
    middle = publish(store, "middle", {5: 5, 9: 0, 30: 8}, base)
    return publish(store, "head", {0: 6, 77: 7}, middle)


def check(store: Store) -> Report:
    return check_store(store, read_data=EVERYTHING)


def repair(store: Store) -> tuple[Outcome, ...]:
    def sweep() -> None:
        for path in store.sandboxes.iterdir():
            shutil.rmtree(path)

    return repair_store(store, plan_repairs(check(store)), sweep_sandboxes=sweep)


def contents(store: Store) -> dict[Path, tuple[int, bytes]]:
    return {
        path: (path.stat().st_ino, path.read_bytes())
        for path in store.home.rglob("*")
        if path.is_file()
    }


def tree(store: Store) -> dict[Path, bytes]:
    """All content but the caches outside the snapshots' content."""
    return {
        path: raw
        for path, (_, raw) in contents(store).items()
        if path.suffix != ".lock" and path.name != "verified.json"
    }


def twin_by_copy(snapshot: Snapshot, target: Path) -> Path:
    """A sandbox's twin on another inode, as where no link could be made."""
    target.parent.mkdir(mode=0o700)
    shutil.copytree(snapshot.path, target)
    return target


def test_a_sound_store_needs_nothing(store: Store, head: Snapshot) -> None:
    before = contents(store)
    assert plan_repairs(check(store)) == ()
    assert repair(store) == ()
    assert contents(store) == before


@pytest.mark.parametrize("name", ["memory.bin", "disk.qcow2"])
@pytest.mark.parametrize("offset", [3, 70, 300, 5000, -1])
def test_a_layer_is_restored_from_a_copy_under_all_its_names(
    store: Store, head: Snapshot, name: str, offset: int
) -> None:
    path = head.path / "ancestry/0" / name
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").rename(path)
    before = tree(store)
    damaged = store.snapshots / "base" / name
    poke(damaged, offset % damaged.stat().st_size)
    (outcome,) = repair(store)
    assert outcome.done
    assert str(path) in outcome.why
    assert check(store).findings == ()
    assert tree(store) == before
    assert damaged.samefile(store.snapshots / "middle/ancestry/0" / name)
    assert list(store.staging.iterdir()) == []


def test_a_missing_name_is_linked_again(store: Store, head: Snapshot) -> None:
    before = tree(store)
    for name in ("base/memory.bin", "head/ancestry/1/disk.qcow2", "middle/ancestry/0/disk.qcow2"):
        (store.snapshots / name).unlink()
    assert all(outcome.done for outcome in repair(store))
    assert check(store).findings == ()
    assert tree(store) == before
    assert (store.snapshots / "base/memory.bin").stat().st_nlink == 3


@pytest.mark.parametrize("tag", ["base", "middle", "head"])
def test_pages_come_back_from_an_image(store: Store, head: Snapshot, tag: str) -> None:
    snapshot = store.get(tag)
    make_image(store, snapshot)
    before = tree(store)
    memory = snapshot.path / "memory.bin"
    index = read_index(memory, label=tag)
    for entry, position in enumerate(index.data_positions.tolist()):
        if position >= 0:
            poke(memory, position + entry)
    poke_inode = memory.stat().st_ino
    (outcome,) = repair(store)
    assert outcome.done
    assert check(store).findings == ()
    assert tree(store) == before
    assert memory.stat().st_ino != poke_inode
    assert memory.stat().st_mode & 0o777 == 0o444


@pytest.mark.parametrize("tag", ["base", "middle", "head"])
@pytest.mark.parametrize("offset", [0, 20, 65, 120, 4000])
def test_even_the_index_comes_back_from_an_image(
    store: Store, head: Snapshot, tag: str, offset: int
) -> None:
    make_image(store, store.get(tag))
    before = tree(store)
    poke(store.snapshots / tag / "memory.bin", offset)
    (outcome,) = repair(store)
    assert outcome.done
    assert check(store).findings == ()
    assert tree(store) == before


def test_pages_are_gathered_from_copies_that_are_all_damaged(store: Store, head: Snapshot) -> None:
    before = tree(store)
    base = store.snapshots / "base/memory.bin"
    copy = twin_by_copy(store.get("base"), store.sandboxes / "sb-1-1/parent") / "memory.bin"
    lock = files.try_lock_directory(copy.parents[1])
    assert lock is not None
    positions = [p for p in read_index(base, label="base").data_positions.tolist() if p >= 0]
    poke(base, positions[0])
    poke(copy, positions[1])
    poke(copy, 0)  # its header too
    (outcome,) = repair(store)
    assert outcome.done
    assert check(store).findings == ()
    os.close(lock)
    shutil.rmtree(copy.parents[1])
    assert tree(store) == before


def test_what_nothing_else_has_stays_damaged_and_untouched(store: Store, head: Snapshot) -> None:
    make_image(store, store.get("head"))  # whose pages 5 and 9 are middle's
    base = store.snapshots / "base/memory.bin"
    index = read_index(base, label="base")
    poke(base, int(index.data_positions[1]))
    poke(store.snapshots / "head/vmstate", 4)
    poke(store.snapshots / "middle/disk.qcow2", 5000)
    before = contents(store)
    outcomes = repair(store)
    assert [outcome.done for outcome in outcomes] == [False] * 3
    assert any("page 5" in outcome.why for outcome in outcomes)
    assert contents(store) == before
    assert [f.kind for f in check(store).findings] == [Kind.VMSTATE, Kind.MEMORY, Kind.DISK]


def test_the_device_state_comes_back_from_a_twin(store: Store, head: Snapshot) -> None:
    before = tree(store)
    twin = twin_by_copy(head, store.sandboxes / "sb-1-1/parent")
    lock = files.try_lock_directory(twin.parent)
    assert lock is not None
    poke(head.vmstate_path, 9)
    (outcome,) = repair(store)
    assert outcome.done
    assert check(store).findings == ()
    os.close(lock)
    shutil.rmtree(twin.parent)
    assert tree(store) == before


@pytest.mark.parametrize(
    "names", [("manifest.json",), ("manifest.b3",), ("manifest.json", "manifest.b3")]
)
@pytest.mark.parametrize("harm", ["flip", "missing"])
def test_a_manifest_comes_back_from_a_twin(
    store: Store, head: Snapshot, names: tuple[str, ...], harm: str
) -> None:
    before = tree(store)
    twin = twin_by_copy(head, store.sandboxes / "sb-1-1/parent")
    lock = files.try_lock_directory(twin.parent)
    assert lock is not None
    for name in names:
        if harm == "flip":
            poke(head.path / name, 20)
        else:
            (head.path / name).unlink()
    (outcome,) = repair(store)
    assert outcome.done
    assert check(store).findings == ()
    os.close(lock)
    shutil.rmtree(twin.parent)
    assert tree(store) == before


def test_a_digest_that_was_flipped_is_known_from_its_manifest(store: Store, head: Snapshot) -> None:
    before = tree(store)
    poke(head.path / "manifest.b3", 40, bit=7)
    (outcome,) = repair(store)
    assert outcome.done
    assert tree(store) == before


def test_a_manifest_of_an_earlier_snapshot_of_the_tag_is_not_taken(
    store: Store, head: Snapshot
) -> None:
    twin = twin_by_copy(head, store.sandboxes / "sb-1-1/parent")
    lock = files.try_lock_directory(twin.parent)
    assert lock is not None
    store.delete("head")
    publish(store, "head", {1: 1})
    (store.snapshots / "head/manifest.json").write_text("{}")
    before = contents(store)
    (outcome,) = repair(store)
    assert not outcome.done
    assert contents(store) == before
    os.close(lock)


def test_layers_are_restored_once_their_manifest_is(store: Store, head: Snapshot) -> None:
    before = tree(store)
    twin = twin_by_copy(head, store.sandboxes / "sb-1-1/parent")
    lock = files.try_lock_directory(twin.parent)
    assert lock is not None
    for name in ("manifest.json", "memory.bin"):
        poke(head.path / name, 100)
    while outcomes := repair(store):  # what the lost manifest hid, the second round finds
        assert all(outcome.done for outcome in outcomes)
    assert check(store).findings == ()
    os.close(lock)
    shutil.rmtree(twin.parent)
    assert tree(store) == before


def test_names_in_sandboxes_are_replaced_too(store: Store, head: Snapshot) -> None:
    sandbox = store.sandboxes / "sb-1-1"
    sandbox.mkdir(mode=0o700)
    lock = files.try_lock_directory(sandbox)
    assert lock is not None
    twin = link_snapshot(head, sandbox / "parent")
    make_image(store, store.get("base"))
    base = store.snapshots / "base/memory.bin"
    with base.open("rb") as opened:
        poke(base, base.stat().st_size - 1)
        damaged = base.read_bytes()
        assert all(outcome.done for outcome in repair(store))
        assert base.samefile(twin.memory_path(0))
        assert opened.read() == damaged  # whoever has the old file open keeps it
    assert check(store).findings == ()
    os.close(lock)


def test_litter_goes_and_strangers_stay(store: Store, head: Snapshot) -> None:
    image = make_image(store, head)
    litter = [
        store.staging / "t",
        store.staging / ".deleted-t-00",
        store.sandboxes / "sb-1-1",
        head.path / ".verified.json.4194305.tmp",
        store.home / ".store.json.4194305.tmp",
        store.images / f".{'ab' * 32}.ram.tmp",
        store.images / f"{'ab' * 32}.ram",
        store.images / f"{'cd' * 32}.json",
        store.templates / "overlay-512.qcow2",
    ]
    for path in litter[:3]:
        path.mkdir(mode=0o700)
    for path in litter[3:]:
        path.write_text("x")
    stranger = store.snapshots / "notes.txt"
    stranger.write_text("mine")
    poke(image, 0)
    before = contents(store)
    outcomes = repair(store)
    assert {outcome.repair.file for outcome in outcomes} == {*litter, image}
    assert all(outcome.done for outcome in outcomes)
    assert not any(path.exists() for path in (*litter, image, image.with_suffix(".json")))
    assert [f.kind for f in check(store).findings] == [Kind.ORPHAN]
    gone = {*litter, image, image.with_suffix(".json")}
    assert contents(store) == {p: c for p, c in before.items() if p not in gone}
    make_image(store, head)
    assert check(store).exit_code == 1


def test_what_is_held_by_then_is_not_touched(store: Store, head: Snapshot) -> None:
    left = store.staging / "t"
    left.mkdir(mode=0o700)
    half = store.images / f".{'ab' * 32}.ram.tmp"
    half.write_text("x")
    plan = plan_repairs(check(store))
    lock = files.try_lock_directory(left)
    assert lock is not None
    with files.locked(store.images / ".ab.lock"):
        outcomes = repair_store(store, plan, sweep_sandboxes=lambda: None)
    assert [outcome.done for outcome in outcomes] == [False, False]
    assert all("in use" in outcome.why for outcome in outcomes)
    assert left.exists()
    assert half.exists()
    os.close(lock)


def test_modes_are_set(store: Store, head: Snapshot) -> None:
    store.images.chmod(0o755)
    head.path.chmod(0o777)
    (head.path / "memory.bin").chmod(0o664)
    assert all(outcome.done for outcome in repair(store))
    assert check(store).findings == ()


def test_a_layer_that_was_made_good_meanwhile_is_not_touched(store: Store, head: Snapshot) -> None:
    path = store.snapshots / "base/memory.bin"
    poke(path, 100)
    plan = plan_repairs(check(store))
    poke(path, 100)
    before = contents(store)
    (outcome,) = repair_store(store, plan, sweep_sandboxes=lambda: None)
    assert outcome.done
    assert contents(store) == before


def test_a_repair_that_fails_changes_nothing(
    store: Store, head: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(store, store.get("base"))
    path = store.snapshots / "base/memory.bin"
    poke(path, path.stat().st_size - 1)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = contents(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        (outcome,) = repair(store)
    assert not outcome.done
    assert "No space" in outcome.why
    assert contents(store) == before
    assert list(store.staging.iterdir()) == []


def test_what_was_made_is_read_back_before_it_takes_a_name(
    store: Store, head: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_image(store, store.get("base"))
    path = store.snapshots / "base/memory.bin"
    poke(path, path.stat().st_size - 1)
    remake = restore_module._remake

    def badly(store: Store, lost: restore_module.Lost, good: Path) -> str | None:
        source = remake(store, lost, good)
        flip(good, good.stat().st_size - 7)
        return source

    monkeypatch.setattr(restore_module, "_remake", badly)
    before = contents(store)
    (outcome,) = repair(store)
    assert not outcome.done
    assert contents(store) == before


def test_a_directory_in_the_place_of_a_file_is_left_alone(store: Store, head: Snapshot) -> None:
    head.disk_path(0).unlink()
    head.disk_path(0).mkdir()
    (outcome,) = repair(store)
    assert not outcome.done
    assert "directory" in outcome.why
    assert head.disk_path(0).is_dir()
