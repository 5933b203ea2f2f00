"""Reading the data: once for each inode, in slices that together are everything."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ratoon.errors import InvalidInput
from ratoon.store.check import scrub as scrub_module
from ratoon.store.check.check import check_store
from ratoon.store.check.findings import Finding, Kind
from ratoon.store.check.scrub import EVERYTHING, Slice, Unit, scrub
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import DATA_OFFSET, read_index
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from small_snapshots import RAM, make_image, poke, publish, stamp_image


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def head(store: Store) -> Snapshot:
    base = publish(store, "base", {n: n + 1 for n in range(100)})
    make_image(store, base)
    return publish(store, "head", {n: n + 1000 for n in range(50, 60)}, base)


@pytest.fixture
def small_grain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub_module, "GRAIN", 4)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the units that were run."""
    seen: list[str] = []

    def noted(unit: Unit) -> Unit:
        def run() -> Iterable[Finding]:
            seen.append(unit.key)
            return unit.run()

        return Unit(unit.key, unit.size, run)

    def spy(units: Iterable[Unit], part: Slice, progress: Any) -> tuple[list[Finding], int]:
        return scrub(map(noted, units), part, progress)

    monkeypatch.setattr("ratoon.store.check.check.scrub", spy)
    return seen


@pytest.mark.usefixtures("small_grain")
@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_slices_partition_the_work(
    store: Store, head: Snapshot, keys: list[str], total: int
) -> None:
    read = check_store(store, read_data=EVERYTHING).bytes_read
    everything = sorted(keys)
    assert len(everything) == 25 + 3 + 2 + RAM // 4
    keys.clear()
    parts = range(1, total + 1) if total < 100 else range(1, total + 1, 100)
    reports = [check_store(store, read_data=Slice(number, total)) for number in parts]
    if total < 100:
        assert sorted(keys) == everything
        assert sum(report.bytes_read for report in reports) == read
    else:
        assert len(keys) < len(everything) // 10
    keys.clear()
    check_store(store, read_data=Slice(1, 2))
    first = list(keys)
    keys.clear()
    check_store(store, read_data=Slice(1, 2))
    assert keys == first


@pytest.mark.usefixtures("small_grain")
def test_one_slice_of_all_finds_the_damage(store: Store, head: Snapshot) -> None:
    memory = store.snapshots / "base/memory.bin"
    poke(memory, DATA_OFFSET + 77 * PAGE_SIZE)
    found = [check_store(store, read_data=Slice(n, 5)).findings for n in range(1, 6)]
    assert sorted(map(len, found)) == [0, 0, 0, 0, 1]


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", " 1/2"])
def test_a_bad_slice_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="n/t"):
        Slice.parse(text)


def test_a_slice_is_parsed() -> None:
    assert Slice.parse("2/7") == Slice(2, 7)
    assert Slice.parse("1/1") == EVERYTHING


def test_each_inode_is_read_once_however_many_names_it_has(
    store: Store, head: Snapshot, keys: list[str]
) -> None:
    check_store(store, read_data=EVERYTHING)
    files = {(p.stat().st_dev, p.stat().st_ino) for p in store.snapshots.rglob("memory.bin")}
    assert len(files) == 2
    before = list(keys)
    for tag in ("a", "b", "c"):
        publish(store, tag, {}, head)
    keys.clear()
    check_store(store, read_data=EVERYTHING)
    assert len(keys) == len(before) + 3  # their own disks; their memory layers have no page


def test_a_copy_is_another_inode_and_read_as_well(store: Store, head: Snapshot) -> None:
    path = head.path / "ancestry/0/memory.bin"
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").rename(path)
    index = read_index(path, label="base")
    poke(path, int(index.data_positions[7]))
    (finding,) = check_store(store, read_data=EVERYTHING).findings
    assert (finding.kind, finding.snapshot, finding.file) == (Kind.MEMORY, "base", path)
    assert finding.page == 7


@pytest.mark.usefixtures("small_grain")
def test_progress_is_told(store: Store, head: Snapshot) -> None:
    told: list[tuple[int, int]] = []
    report = check_store(store, read_data=EVERYTHING, progress=lambda *now: told.append(now))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {report.bytes_read}
    assert told[-1] == (report.bytes_read, report.bytes_read)


def test_without_read_data_no_page_is_read(
    store: Store, head: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(scrub_module, "read_pages", never)
    monkeypatch.setattr(scrub_module, "read_image", never)
    assert check_store(store).sound


def test_data_where_an_image_must_have_a_hole_and_the_reverse(store: Store, head: Snapshot) -> None:
    image = next(store.images.glob("*.ram"))
    with image.open("r+b") as file:
        file.seek(200 * PAGE_SIZE + 9)
        file.write(b"x")
        file.seek(3 * PAGE_SIZE)
        file.write(bytes(PAGE_SIZE))
    stamp_image(image)
    found = check_store(store, read_data=EVERYTHING).findings
    assert [(f.kind, f.snapshot, f.page) for f in found] == [
        (Kind.IMAGE, "base", 3),
        (Kind.IMAGE, "base", 200),
    ]


def test_pages_that_cannot_be_read_are_named_and_the_others_read(
    store: Store, head: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with one bad sector, and a flipped bit elsewhere."""
    memory = store.snapshots / "base/memory.bin"
    index = read_index(memory, label="base")
    bad = int(index.data_positions[30])
    poke(memory, int(index.data_positions[90]))
    inode = memory.stat().st_ino
    preadv = os.preadv

    def failing(fd: int, buffers: Any, offset: int) -> int:
        length = sum(memoryview(buffer).nbytes for buffer in buffers)
        if os.fstat(fd).st_ino == inode and offset <= bad < offset + length:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    found = check_store(store, read_data=EVERYTHING).findings
    assert [(f.kind, f.snapshot, f.page) for f in found] == [
        (Kind.MEMORY, "base", 30),
        (Kind.MEMORY, "base", 90),
    ]
    assert "Input/output error" in found[0].what
    assert "digest" in found[1].what
