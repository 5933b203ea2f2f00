"""Every flipped bit is found, and named: which snapshot, which file, which page."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ratoon.store.check.check import check_store
from ratoon.store.check.findings import Kind
from ratoon.store.check.scrub import EVERYTHING
from ratoon.store.memory.pageset import DATA_OFFSET, PageIndex, read_index
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from small_snapshots import make_image, poke, publish, stamp_image

FLIPS = 1_200
SEED = 20_240_607


@dataclass(frozen=True)
class Target:
    """A region of a file, and what a flip at a place of it must be called."""

    what: str
    path: Path
    begin: int
    end: int
    kind: Kind
    tag: str
    page: Callable[[int], int | None] = lambda offset: None


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """base ← L1 ← L2 and a second child of base; L1 was deleted, L2 and the child have images."""
    store = Store.open(tmp_path)
    base = publish(store, "base", {n: n for n in (0, 1, 2, 40, 41, 90, 254, 255)})
    first = publish(store, "L1", {1: 1001, 2: 0, 40: 1040, 100: 1100}, base)
    second = publish(store, "L2", {0: 2000, 101: 2101}, first)
    child = publish(store, "child", {7: 3007, 90: 3090}, base)
    store.delete("L1", force=True)
    make_image(store, second)
    make_image(store, child)
    return store


def targets_of(store: Store) -> Iterator[Target]:
    for tag in ("base", "L2", "child"):
        snapshot = store.get(tag)
        for name in ("manifest.json", "manifest.b3"):
            path = snapshot.path / name
            yield Target(name, path, 0, path.stat().st_size, Kind.MANIFEST, tag)
        size = snapshot.vmstate_path.stat().st_size
        yield Target("vmstate", snapshot.vmstate_path, 0, size, Kind.VMSTATE, tag)
    yield from layer_targets(store.get("base"), 0)
    yield from layer_targets(store.get("L2"), 1)  # L1's, which only L2 still has
    yield from layer_targets(store.get("L2"), 2)
    yield from layer_targets(store.get("child"), 1)
    for tag in ("L2", "child"):
        image = store.images / f"{store.get(tag).manifest.memory_root}.ram"
        size = image.stat().st_size
        yield Target("image", image, 0, size, Kind.IMAGE, tag, lambda offset: offset // 4096)


def layer_targets(snapshot: Snapshot, number: int) -> Iterator[Target]:
    tag = snapshot.manifest.layers[number].tag
    disk = snapshot.disk_path(number)
    yield Target("disk", disk, 0, disk.stat().st_size, Kind.DISK, tag)
    memory = snapshot.memory_path(number)
    index = read_index(memory, label=tag)
    tail = DATA_OFFSET + 4096 * index.stored
    digests = tail + 8 * len(index.numbers)
    for what, begin, end in (
        ("header", 0, 64),
        ("padding", 64, DATA_OFFSET),
        ("numbers", tail, digests),
        ("digests", digests, memory.stat().st_size),
    ):
        yield Target(what, memory, begin, end, Kind.MEMORY, tag)
    yield Target("data", memory, DATA_OFFSET, tail, Kind.MEMORY, tag, page_at(index))


def page_at(index: PageIndex) -> Callable[[int], int]:
    pages = {
        int(position) // 4096: int(number)
        for position, number in zip(index.data_positions, index.numbers, strict=True)
        if position >= 0
    }
    return lambda offset: pages[offset // 4096]


def test_no_flip_is_missed_or_misnamed(store: Store) -> None:
    """Flips that leave no trace in any time or stamp, as bits that rot on a disk do."""
    draw = random.Random(SEED)
    targets = list(targets_of(store))
    assert check_store(store, read_data=EVERYTHING).sound
    tried: Counter[str] = Counter()
    for number in range(FLIPS):
        target = targets[number % len(targets)]
        offset, bit = draw.randrange(target.begin, target.end), draw.randrange(8)
        poke(target.path, offset, bit)
        if target.kind is Kind.IMAGE:
            stamp_image(target.path)
        report = check_store(store, read_data=EVERYTHING)
        poke(target.path, offset, bit)
        if target.kind is Kind.IMAGE:
            stamp_image(target.path)
        found = [(f.kind, f.snapshot, f.file, f.page) for f in report.findings]
        # L1 was deleted, which is a note about L2.
        found = [finding for finding in found if finding[0] is not Kind.PARENT_GONE]
        expected = (target.kind, target.tag, target.path, target.page(offset))
        assert found == [expected], f"{target.what} {target.path}, byte {offset}, bit {bit}"
        assert report.exit_code == (1 if target.kind is Kind.IMAGE else 5)
        tried[target.what] += 1
    assert check_store(store, read_data=EVERYTHING).sound
    assert sum(tried.values()) == FLIPS
    assert set(tried) == {
        *("manifest.json", "manifest.b3", "vmstate", "disk", "image"),
        *("header", "numbers", "digests", "padding", "data"),
    }


def test_many_flips_at_once_are_named_each_by_its_page(store: Store) -> None:
    base = store.get("base")
    index = read_index(base.memory_path(0), label="base")
    for position in index.data_positions[[1, 4, 7]].tolist():
        poke(base.memory_path(0), position + 5)
    found = check_store(store, read_data=EVERYTHING).findings
    assert [(f.kind, f.snapshot, f.page) for f in found if f.page is not None] == [
        (Kind.MEMORY, "base", int(index.numbers[entry])) for entry in (1, 4, 7)
    ]
