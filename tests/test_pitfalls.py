"""Mistakes that merging snapshots invites, one test each, named for the pitfall."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from ratoon.errors import AlreadyExists, Corrupt, InvalidInput
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import DIGEST_SIZE, PAGE_SIZE
from ratoon.store.memory.pageset import read_index, read_pages
from ratoon.store.snapshot.compact import compact
from ratoon.store.snapshot.links import read_links
from ratoon.store.snapshot.manifest import decode, encode
from ratoon.store.snapshot.snapshot import MEMORY, Snapshot
from ratoon.store.snapshot.store import Store
from small_snapshots import RAM, contents, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def chain(store: Store) -> list[Snapshot]:
    base = publish(store, "base", {n: n % 5 + 1 for n in range(0, 120, 2)})
    one = publish(store, "one", dict.fromkeys(range(0, 60, 3), 7), base)
    return [base, one, publish(store, "two", {2: 0, 5: 9}, one)]


def ram(snapshot: Snapshot, directory: Path) -> bytes:
    image = ImageStore(directory).make(read_links(snapshot), RAM)
    return image.read_bytes()


def test_readers_of_one_layer_share_no_seek_offset(chain: list[Snapshot], tmp_path: Path) -> None:
    links = read_links(chain[0])
    readers = [read_pages(links[0].path, links[0].index, None, label="base") for _ in range(2)]
    for (left, one), (right, two) in zip(*readers, strict=True):  # in turn, chunk by chunk
        assert np.array_equal(left, right)
        assert np.array_equal(one, two)
    expected = [ram(snapshot, tmp_path / "alone") for snapshot in chain]
    with ThreadPoolExecutor(12) as pool:
        made = [
            pool.submit(ram, chain[number % 3], tmp_path / f"together{number}")
            for number in range(12)
        ]
    for number, future in enumerate(made):
        assert future.result() == expected[number % 3]


def test_a_diff_is_never_the_file_of_its_base(store: Store, chain: list[Snapshot]) -> None:
    flat = compact(store, "two", "flat")
    inodes = [each.memory_path(each.depth).stat().st_ino for each in (*chain, flat)]
    assert len(set(inodes)) == len(inodes)


def test_a_snapshot_appears_whole(
    store: Store, chain: list[Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename
    seen: list[bool] = []

    def watched(source: Path, target: Path) -> Path:
        if target == store.snapshots / "three":
            assert not target.exists()
            complete = contents(source)
            renamed = rename(source, target)
            seen.append(contents(target) == complete and "manifest.b3" in complete)
            return renamed
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", watched)
    publish(store, "three", {1: 1}, chain[-1])
    assert seen == [True]


@pytest.mark.parametrize("tag", ["base", "one"])
def test_neither_base_nor_parent_is_overwritten(
    store: Store, chain: list[Snapshot], tag: str
) -> None:
    before = contents(store.snapshots / tag)
    with pytest.raises(AlreadyExists, match=tag):
        publish(store, tag, {0: 99}, chain[-1])
    with pytest.raises(InvalidInput):
        compact(store, tag, tag)
    assert contents(store.snapshots / tag) == before


def test_a_cycle_is_refused(chain: list[Snapshot]) -> None:
    """A snapshot whose parent is itself."""
    manifest = chain[-1].manifest
    raw = encode(manifest).replace(chain[1].manifest.id.encode(), manifest.id.encode())
    with pytest.raises(Corrupt, match=r"snapshot two.*twice"):
        decode(raw, blake3(raw).hexdigest(), label="snapshot two")


def test_a_missing_layer_is_named(chain: list[Snapshot]) -> None:
    chain[-1].memory_path(0).unlink()
    with pytest.raises(Corrupt, match=r"base.*memory\.bin"):
        read_links(chain[-1])


@pytest.mark.parametrize("size", [PAGE_SIZE, -PAGE_SIZE, -1])
def test_a_layer_of_another_size_is_named(chain: list[Snapshot], size: int) -> None:
    path = chain[-1].memory_path(1)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    with pytest.raises(Corrupt, match=r"one.*memory\.bin"):
        read_links(chain[-1])


def test_a_page_beyond_the_ram_is_named(chain: list[Snapshot]) -> None:
    path = chain[-1].path / MEMORY
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(-2 * DIGEST_SIZE - 8, os.SEEK_END)  # the last of two page numbers
        file.write((RAM + 3).to_bytes(8, "little"))
    with pytest.raises(Corrupt, match=rf"two: page {RAM + 3} is beyond"):
        read_index(path, label="two")
    with pytest.raises(Corrupt, match="two"):  # the index digest finds it first
        read_links(chain[-1])
