"""Disk usage: each inode, hole and shared extent once, and to whom it belongs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ratoon.bench.loop_mounts import mounted, used_bytes, what_is_missing
from ratoon.errors import InvalidInput, NotFound
from ratoon.files import copy_sparse
from ratoon.machine.volumes import named
from ratoon.store.snapshot.extents import shared_extents
from ratoon.store.snapshot.inventory import take_inventory
from ratoon.store.snapshot.retention import Rules, make_plan
from ratoon.store.snapshot.snapshot import link_snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.usage import Usage, _sweep, snapshot_usage, usage
from ratoon.units import MIB
from small_snapshots import make_image, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """base, and on it a and b; the chain a, a1."""
    store = Store.open(tmp_path / "home")
    base = publish(store, "base", {number: number + 1 for number in range(100)})
    a = publish(store, "a", {1: 500}, base)
    publish(store, "a1", {2: 600}, a)
    publish(store, "b", {1: 501}, base)
    return store


def blocks(*paths: Path) -> int:
    """Bytes that these and all below them take, each inode once."""
    found = {}
    for top in paths:
        for path in (top, *top.rglob("*")):
            status = path.lstat()
            found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())


def test_the_total_is_that_of_all_inodes(store: Store) -> None:
    assert usage(store).total == blocks(store.home)
    make_image(store, store.get("a"))
    link_snapshot(store.get("a"), store.sandboxes / "sb-0-0")
    whole = usage(store)
    assert whole.total == blocks(store.home)
    assert whole.snapshots.keys() == {"base", "a", "a1", "b"}
    assert whole.images.keys() == {store.get("a").manifest.memory_root}
    assert whole.sandboxes.keys() == {"sb-0-0"}


@pytest.mark.parametrize("tag", ["base", "a", "a1", "b"])
def test_own_is_what_deleting_it_alone_frees(store: Store, tag: str) -> None:
    one = snapshot_usage(store, tag)
    before = blocks(store.home)
    path = store.snapshots / tag
    assert one.total == blocks(path)
    directories = sum(d.stat().st_blocks for d in (store.snapshots, store.staging)) * 512
    store.delete(tag, force=True)
    directories -= sum(d.stat().st_blocks for d in (store.snapshots, store.staging)) * 512
    assert before - blocks(store.home) == one.own + directories
    assert one.own > 0


def test_layers_that_others_hold_are_shared(store: Store) -> None:
    base = store.get("base")
    layers = blocks(base.memory_path(0), base.disk_path(0))
    assert snapshot_usage(store, "base").shared == layers
    store.delete("a", cascade=True)
    assert snapshot_usage(store, "base").shared == layers, "b holds them"
    store.delete("b")
    assert snapshot_usage(store, "base").shared == 0


def test_what_a_sandbox_holds_is_not_freed_by_deleting_the_snapshot(store: Store) -> None:
    before = snapshot_usage(store, "a1")
    twin = link_snapshot(store.get("a1"), store.sandboxes / "sb-0-0")
    after = snapshot_usage(store, "a1")
    assert after.total == before.total
    assert after.own == blocks(store.snapshots / "a1") - blocks(
        *(path for path in twin.path.rglob("*") if path.is_file())
    )
    assert usage(store).sandboxes["sb-0-0"].shared == after.shared


def test_an_image_goes_with_the_only_snapshot_of_its_memory(store: Store) -> None:
    before = snapshot_usage(store, "a")
    image = make_image(store, store.get("a"))
    size = blocks(image, image.with_suffix(".json"))
    assert size < 2 * MIB
    assert image.stat().st_size == MIB
    after = snapshot_usage(store, "a")
    assert (after.own, after.shared) == (before.own + size, before.shared)
    assert usage(store).images[image.stem] == Usage(own=size, shared=0)
    publish(store, "equal", {}, store.get("a"))
    assert store.get("equal").manifest.memory_root == image.stem
    assert snapshot_usage(store, "a").own == before.own, "equal needs the image as well"
    for tag in ("a", "equal"):
        assert snapshot_usage(store, tag).total >= size


def test_holes_count_nothing(store: Store) -> None:
    sandbox = store.sandboxes / "sb-0-0"
    sandbox.mkdir()
    with (sandbox / "disk.qcow2").open("wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 30)
        file.write(b"x" * 8192)
        file.flush()
        os.fsync(file.fileno())
    found = usage(store).sandboxes["sb-0-0"]
    assert 8192 <= found.own <= 64 * 1024
    assert found.shared == 0


def test_names_outside_the_store_keep_what_they_name(store: Store, tmp_path: Path) -> None:
    before = snapshot_usage(store, "b")
    memory = store.get("b").memory_path(1)
    (tmp_path / "elsewhere").hardlink_to(memory)
    after = snapshot_usage(store, "b")
    assert (after.own, after.total) == (before.own - blocks(memory), before.total)


def test_a_damaged_snapshot_is_counted_too(store: Store) -> None:
    before = usage(store)
    (store.snapshots / "b" / "manifest.b3").write_bytes(b"0" * 64 + b"\n")
    assert usage(store).snapshots["b"] == before.snapshots["b"]


def test_unknown_tags(store: Store) -> None:
    with pytest.raises(NotFound, match="no snapshot nobody"):
        snapshot_usage(store, "nobody")
    with pytest.raises(InvalidInput):
        snapshot_usage(store, "../base")


def test_what_vanishes_meanwhile_is_left_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lstat = Path.lstat

    def deleting(path: Path) -> os.stat_result:
        status = lstat(path)
        if path.name == "a1" and path.exists():
            store.delete("a1")
        return status

    monkeypatch.setattr(Path, "lstat", deleting)
    assert usage(store).snapshots.keys() >= {"base", "a", "b"}


def test_named_volumes_are_holders_like_others(store: Store) -> None:
    """What is linked out of one is not its own; the store's own files are none of a volume's."""
    volumes = store.home / "volumes"
    for name in ("cache", "data"):
        (volumes / name / "below").mkdir(parents=True)
        (volumes / name / "below/file").write_bytes(b"x" * 5000)
    for name in (".key", ".cache.removed"):
        (volumes / name).write_bytes(b"x" * 5000)
    (volumes / "data/linked").hardlink_to(volumes / "cache/below/file")
    (store.home.parent / "outside").hardlink_to(volumes / "data/below/file")
    found = usage(store)
    assert found.volumes.keys() == {"cache", "data"}
    assert found.total == blocks(store.home)
    directories = blocks(volumes / "cache") - 8192
    assert found.volumes["cache"] == Usage(directories, 8192)
    assert found.volumes["data"] == Usage(directories, 2 * 8192)


def test_what_a_guest_does_to_its_volume_stops_nobody(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directories deeper than a path is long, and such as are links by the time they are read."""
    volume = store.home / "volumes/mine"
    (volume / "directory").mkdir(parents=True)
    (volume / "file").write_bytes(b"x" * 5000)
    deep = os.open(volume, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("a" * 250, dir_fd=deep)
        below = os.open("a" * 250, os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=deep))
    os.close(deep)
    (listed,) = named.listed(store.home)
    assert listed.bytes >= 8192
    before = usage(store).volumes["mine"]
    really = Path.lstat

    def swapping(path: Path) -> os.stat_result:
        status = really(path)
        if path.name == "directory":
            path.rmdir()
            path.touch()
        if path == volume / "file":
            path.unlink()
            path.symlink_to("directory")
        return status

    monkeypatch.setattr(Path, "lstat", swapping)
    assert usage(store).volumes["mine"].total <= before.total
    shutil.rmtree(volume)


def test_shared_stretches_belong_to_all_that_refer_to_them() -> None:
    a, b = frozenset("a"), frozenset("b")

    def edges(*extents: tuple[int, int, frozenset[str]]) -> list[tuple[int, int, frozenset[str]]]:
        return [
            edge
            for start, end, holders in extents
            for edge in ((start, 1, holders), (end, -1, holders))
        ]

    swept = [*_sweep(edges((0, 100, a), (50, 150, b), (50, 60, a), (200, 300, a), (200, 300, a)))]
    found = [(size, frozenset().union(*groups)) for size, groups in swept]
    outside = frozenset(["outside"])
    assert found == [(50, a | outside), (10, a | b), (40, a | b), (50, b | outside), (100, a)]


@pytest.fixture(params=["xfs", "btrfs"])
def reflinking(request: pytest.FixtureRequest) -> Iterator[Store]:
    """An empty store on a file system that shares extents."""
    if missing := what_is_missing(request.param):
        pytest.skip(f"no {request.param} can be mounted: {missing}")
    with mounted(request.param, 512 * MIB) as root:
        yield Store.open(root / "home")


def grow(path: Path, size: int = 8 * MIB) -> Path:
    """A file of its own, written to the disk."""
    with path.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
    return path


def reflink(source: Path, target: Path) -> Path:
    copy_sparse(source, target)
    os.sync()
    return target


def test_shared_extents_count_once(reflinking: Store) -> None:
    store = reflinking
    for tag in ("one", "two"):
        publish(store, tag)
    before = usage(store)
    layer = grow(store.snapshots / "one" / "grown")
    assert shared_extents(layer) == []
    assert snapshot_usage(store, "one").own == before.snapshots["one"].own + 8 * MIB
    root = "ab" * 32
    copy = reflink(layer, store.images / f"{root}.ram")
    assert sum(end - start for start, end in shared_extents(copy)) == 8 * MIB

    def grown(get: Callable[[], Usage], since: Usage | None = None) -> tuple[int, int]:
        since = since or Usage(0, 0)
        return get().own - since.own, get().shared - since.shared

    first = before.snapshots["one"]
    assert grown(lambda: usage(store).snapshots["one"], first) == (0, 8 * MIB)
    assert grown(lambda: usage(store).images[root]) == (0, 8 * MIB)
    assert usage(store).total == before.total + 8 * MIB
    reflink(layer, store.snapshots / "two" / "grown")
    assert usage(store).total == before.total + 8 * MIB
    # What is written to a copy is the copy's own.
    with copy.open("r+b") as file:
        file.write(os.urandom(2 * MIB))
        file.flush()
        os.fsync(file.fileno())
    os.sync()
    assert usage(store).images[root] == Usage(own=2 * MIB, shared=6 * MIB)
    assert usage(store).total == before.total + 10 * MIB
    copy.unlink()
    (store.snapshots / "two" / "grown").unlink()
    deadline = time.monotonic() + 30
    while shared_extents(layer) and time.monotonic() < deadline:
        used_bytes(store.home.parent)  # xfs lets go of deleted files later
    assert grown(lambda: usage(store).snapshots["one"], first) == (8 * MIB, 0)


def test_what_is_shared_with_a_file_outside_is_not_freed(reflinking: Store) -> None:
    store = reflinking
    publish(store, "one")
    before = snapshot_usage(store, "one")
    cached = grow(store.home.parent / "cached")
    reflink(cached, store.snapshots / "one" / "disk-copy")
    after = snapshot_usage(store, "one")
    assert (after.own, after.shared) == (before.own, before.shared + 8 * MIB)


def test_own_is_what_the_file_system_gets_back(reflinking: Store) -> None:
    store = reflinking
    for tag in ("one", "two"):
        publish(store, tag)
    layer = grow(store.snapshots / "one" / "grown", 16 * MIB)
    reflink(layer, store.snapshots / "two" / "grown")
    with layer.open("r+b") as file:
        file.write(os.urandom(5 * MIB))
        file.flush()
        os.fsync(file.fileno())
    before = used_bytes(store.home.parent)
    own = snapshot_usage(store, "one").own
    assert 5 * MIB <= own < 6 * MIB
    plan = make_plan(take_inventory(store), Rules(keep_within=0, keep=("two",)), time.time())
    assert plan.freed == own
    store.delete("one")
    deadline = time.monotonic() + 30
    freed = 0
    # btrfs frees with its next transaction, xfs at leisure.
    while abs(freed - own) >= MIB and time.monotonic() < deadline:
        freed = before - used_bytes(store.home.parent)
    assert abs(freed - own) < MIB
