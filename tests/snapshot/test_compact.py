"""Compacting: an equal snapshot of depth 0, or none at all."""

from __future__ import annotations

import subprocess
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from memory_helpers import last_data_byte
from ratoon.errors import AlreadyExists, Corrupt, HostError, InFlight, InvalidInput, NotFound
from ratoon.store.disk import flatten as flatten_module
from ratoon.store.disk.qcow2 import check_header
from ratoon.store.memory import merge as merge_module
from ratoon.store.memory.chain import resolve
from ratoon.store.memory.image import ImageStore
from ratoon.store.snapshot import compact as compact_module
from ratoon.store.snapshot.compact import compact
from ratoon.store.snapshot.links import ram_pages, read_links
from ratoon.store.snapshot.snapshot import Snapshot, read_vmstate
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import check_sizes, verify_disks
from small_snapshots import make_layer, poke, publish


def write(commands: tuple[str, ...], path: Path) -> None:
    make_layer(path, *commands)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """The chain base, L1, L2."""
    store = Store.open(tmp_path / "home")

    parent = None
    for tag, pages, commands in (
        ("base", {0: 1, 1: 2, 7: 3, 200: 4}, ("write -P 0x41 0 256k",)),
        ("L1", {1: 5, 9: 6}, ("write -P 0x42 64k 64k",)),
        ("L2", {7: 0, 9: 7}, ("write -z 128k 64k", "write -P 0x43 512k 4k")),
    ):
        parent = publish(store, tag, pages, parent=parent, write_disk=partial(write, commands))
    return store


def content_of(snapshot: Snapshot, target: Path) -> bytes:
    """All that the guest sees of its disk."""
    layers = [snapshot.disk_path(number) for number in range(snapshot.depth + 1)]
    flatten_module.flatten_raw(layers, target)
    return target.read_bytes()


def unchanged(store: Store, before: set[str]) -> bool:
    assert list(store.staging.iterdir()) == []
    return {path.name for path in store.snapshots.iterdir()} == before


def test_it_is_an_equal_snapshot_that_stands_on_nothing(store: Store, tmp_path: Path) -> None:
    said: list[str] = []
    source = store.get("L2")
    made = compact(store, "L2", "flat", said.append)
    assert made == store.get("flat")
    assert list(store.staging.iterdir()) == []
    old, new = source.manifest, made.manifest
    assert (made.depth, new.parent, new.branched_from) == (0, None, "compact:L2")
    assert (new.memory_root, new.machine, new.guest) == (old.memory_root, old.machine, old.guest)
    assert new.id not in {layer.id for layer in old.layers}
    assert read_vmstate(made) == read_vmstate(source)
    check_sizes(made)
    verify_disks(made)
    [link] = read_links(made)
    assert link.root == old.memory_root
    assert np.array_equal(
        resolve([link], ram_pages(made)), resolve(read_links(source), ram_pages(source))
    )
    assert {path.name for path in made.path.iterdir()} == {
        *("manifest.json", "manifest.b3", "verified.json", "memory.bin", "vmstate", "disk.qcow2")
    }
    assert said[0] == "checking the disk of L2"
    assert said[-1] == "publishing flat"


def test_the_guest_sees_the_same_memory_and_disk(store: Store, tmp_path: Path) -> None:
    made = compact(store, "L2", "flat")
    source = store.get("L2")
    images = [
        ImageStore(tmp_path / name).make(read_links(each), ram_pages(each)).read_bytes()
        for name, each in (("one", source), ("two", made))
    ]
    assert images[0] == images[1]
    check_header(made.disk_path(0), label="the disk")
    assert content_of(made, tmp_path / "a.raw") == content_of(source, tmp_path / "b.raw")
    compared = subprocess.run(
        ["qemu-img", "compare", "-s", tmp_path / "b.raw", "-f", "raw", made.disk_path(0)],
        capture_output=True,
        check=False,
    )
    assert compared.returncode in (0, 1), compared  # 1: -s minds how much is allocated


def test_it_shares_nothing_with_its_source(store: Store) -> None:
    made = compact(store, "L2", "flat")
    names = {(p.stat().st_dev, p.stat().st_ino) for p in made.path.rglob("*")}
    for tag in ("base", "L1", "L2"):
        path = store.get(tag).path
        assert not names & {(p.stat().st_dev, p.stat().st_ino) for p in path.rglob("*")}
    store.delete("base", cascade=True)
    check_sizes(store.get("flat"))
    verify_disks(store.get("flat"))


def test_a_base_can_be_compacted_too(store: Store) -> None:
    made = compact(store, "base", "copy")
    assert made.manifest.memory_root == store.get("base").manifest.memory_root
    assert store.dependents("base") == ("L1",)
    assert store.dependents("copy") == ()


def test_compacting_what_was_compacted(store: Store) -> None:
    compact(store, "L2", "once")
    assert compact(store, "once", "twice").manifest.branched_from == "compact:once"


def test_refusals(store: Store) -> None:
    before = {"base", "L1", "L2"}
    with pytest.raises(InvalidInput, match="compact L2 into another tag"):
        compact(store, "L2", "L2")
    for source, target in (("../L2", "ok"), ("L2", "a/b")):
        with pytest.raises(InvalidInput, match="bad tag"):
            compact(store, source, target)
    with pytest.raises(NotFound, match="no snapshot nobody"):
        compact(store, "nobody", "ok")
    with pytest.raises(AlreadyExists, match="snapshot L1"):
        compact(store, "L2", "L1")
    with store.stage("ok"), pytest.raises(InFlight, match="snapshot ok"):
        compact(store, "L2", "ok")
    assert unchanged(store, before)


def test_a_damaged_page_is_named_and_nothing_published(store: Store) -> None:
    path = store.get("L2").memory_path(0)
    path.chmod(0o644)
    poke(path, last_data_byte(path))  # of page 200
    with pytest.raises(Corrupt, match=r"snapshot base.*page 200"):
        compact(store, "L2", "flat")
    assert unchanged(store, {"base", "L1", "L2"})


def test_a_damaged_disk_is_named_and_nothing_published(store: Store) -> None:
    snapshot = store.get("L2")
    path = snapshot.disk_path(1)
    poke(path, path.stat().st_size - 1)
    (snapshot.path / "verified.json").unlink()
    with pytest.raises(Corrupt, match=r"snapshot L1.*disk\.qcow2"):
        compact(store, "L2", "flat")
    assert unchanged(store, {"base", "L1", "L2"})


def test_a_damaged_device_state_is_not_copied(store: Store) -> None:
    poke(store.get("L2").vmstate_path, 3)
    with pytest.raises(Corrupt, match="vmstate"):
        compact(store, "L2", "flat")
    assert unchanged(store, {"base", "L1", "L2"})


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (compact_module, "verify_disks"),
        (compact_module, "read_vmstate"),
        (merge_module, "write_page_stream"),
        (merge_module, "_read_back"),
        (compact_module, "flatten"),
        (compact_module, "file_digest"),
    ],
)
def test_a_failure_at_any_step_leaves_the_store_as_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch, module: object, name: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise HostError("injected")

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(HostError, match="injected"):
        compact(store, "L2", "flat")
    assert unchanged(store, {"base", "L1", "L2"})


def test_a_source_deleted_meanwhile_is_compacted_all_the_same(store: Store, tmp_path: Path) -> None:
    expected = content_of(store.get("L2"), tmp_path / "a.raw")

    def delete(message: str) -> None:
        if message == "checking the disk of L2":
            store.delete("base", cascade=True)

    made = compact(store, "L2", "flat", delete)
    assert content_of(made, tmp_path / "b.raw") == expected
    assert unchanged(store, {"flat"})


def test_of_two_at_once_one_makes_it(store: Store) -> None:
    outcomes: list[object] = []
    start = threading.Barrier(2)

    def attempt() -> None:
        start.wait()
        try:
            outcomes.append(compact(store, "L2", "flat").depth)
        except (InFlight, AlreadyExists) as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(0) == 1
    assert unchanged(store, {"base", "L1", "L2", "flat"})
