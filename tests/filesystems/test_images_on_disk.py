"""Layers and images on ext4, xfs and btrfs: whole, apart, and no dearer than need be."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from loop_volumes import Volume

from memory_helpers import RAM, flatten, guest_on, ram_of, write_chain
from ratoon.bench.disk import CHAINS, RAM_PAGES
from ratoon.bench.disk import write_chain as write_guest_chain
from ratoon.bench.loop_mounts import used_bytes
from ratoon.errors import Corrupt
from ratoon.files import copy_sparse
from ratoon.store.memory.chain import Link, resolve
from ratoon.store.memory.digests import hash_pages, memory_root
from ratoon.store.memory.dirty import dirty_pages
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import DATA_OFFSET, read_index, read_pages
from ratoon.store.memory.process import find_mapping
from ratoon.store.memory.reflink import can_reflink

pytest_plugins = ["filesystem_fixtures"]
pytestmark = pytest.mark.filesystems

CHAIN = [{1: 1, 2: 2, 3: 3, 9: 4, 10: 5}, {2: 0, 3: 6, 5: 7, 6: 0, 7: 8}]


@pytest.fixture
def links(place: Path) -> list[Link]:
    return write_chain(place, CHAIN)


@pytest.fixture
def store(place: Path) -> ImageStore:
    return ImageStore(place / "images")


def data_pages(path: Path) -> list[int]:
    """The pages of a sparse file that are not holes."""
    with path.open("rb") as file:
        count = path.stat().st_size // PAGE_SIZE
        starts = [os.lseek(file.fileno(), n * PAGE_SIZE, os.SEEK_HOLE) for n in range(count)]
    return [n for n, hole in enumerate(starts) if hole != n * PAGE_SIZE]


def drop_caches(path: Path) -> None:
    """Have what is read next come from the disk."""
    used_bytes(path)
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_which_file_systems_share_extents(volume: Volume) -> None:
    assert can_reflink(volume.root) == (volume.kind in ("xfs", "btrfs"))


def test_a_layer_is_read_back(links: list[Link]) -> None:
    for link, layer in zip(links, CHAIN, strict=True):
        drop_caches(link.path)
        index = read_index(link.path, label="L", expected_digest=link.index.index_digest)
        found = ram_of({})
        for numbers, pages in read_pages(link.path, index, None, label="L"):
            found[numbers] = pages
        assert (found == ram_of(layer)).all()


def test_an_image_is_the_merged_memory_and_sparse(links: list[Link], store: ImageStore) -> None:
    image = store.make(links, RAM)
    drop_caches(image)
    ram = ram_of(flatten(CHAIN))
    assert image.read_bytes() == ram.tobytes()
    assert data_pages(image) == np.flatnonzero(ram.any(axis=1)).tolist()
    (cached,) = store.cached()
    assert 6 <= cached.allocated_bytes / PAGE_SIZE <= 7, "ext4 may need a block for the extents"
    assert ImageStore(store.directory).find(links[-1].root, RAM) == image


def test_all_zero_ram_takes_nothing(store: ImageStore) -> None:
    store.make((), RAM)
    assert [image.allocated_bytes for image in store.cached()] == [0]


def test_forks_are_apart(links: list[Link], store: ImageStore) -> None:
    """On btrfs, /proc/PID/maps shows another device than `stat` does."""
    image = store.make(links, RAM)
    layers = [link.path.read_bytes() for link in links]
    expected, stat = image.read_bytes(), image.stat()
    with guest_on(image) as one, guest_on(image) as other:
        one.do(f"ram[{3 * PAGE_SIZE}] = 77; ram[{20 * PAGE_SIZE}] = 78")
        other.do(f"assert (ram[{3 * PAGE_SIZE}], ram[{20 * PAGE_SIZE}]) == (6, 0)")
        other.do(f"ram[{9 * PAGE_SIZE}] = 79")
        dirty = {}
        for guest in (one, other):
            mapping = find_mapping(guest.pid, stat.st_dev, stat.st_ino, RAM * PAGE_SIZE)
            dirty[guest] = dirty_pages(guest.pid, mapping.start, mapping.length).tolist()
        assert dirty == {one: [3, 20], other: [9]}
        drop_caches(image)
        assert image.read_bytes() == expected
    assert image.stat() == stat
    assert [link.path.read_bytes() for link in links] == layers


def test_an_image_outlives_its_layers_and_its_forks_outlive_it(
    links: list[Link], store: ImageStore
) -> None:
    image = store.make(links, RAM)
    for link in links:
        link.path.unlink()
    drop_caches(image)
    assert image.read_bytes() == ram_of(flatten(CHAIN)).tobytes()
    with guest_on(image) as guest:
        store.remove(links[-1].root)
        guest.do(f"assert (ram[{PAGE_SIZE}], ram[{7 * PAGE_SIZE}]) == (1, 8)")


def test_a_damaged_layer_makes_no_image(links: list[Link], store: ImageStore) -> None:
    links[0].path.chmod(0o600)
    with links[0].path.open("r+b") as file:
        file.seek(DATA_OFFSET + 3 * PAGE_SIZE + 9)
        file.write(b"!")
    with pytest.raises(Corrupt, match="snapshot L0, memory layer: page 9 does not match"):
        store.make(links, RAM)
    assert [path.suffix for path in store.directory.iterdir()] == [".lock"]


def test_what_a_head_s_image_adds_to_the_disk(volume: Volume, place: Path) -> None:
    """Sharing extents, less than a twentieth of what it holds; else what it holds."""
    links = write_guest_chain(place, CHAINS["guest"])
    store = ImageStore(place / "images")
    before = used_bytes(volume.root)
    image = store.make(links, RAM_PAGES)
    added = used_bytes(volume.root) - before
    ram = np.fromfile(image, np.uint8).reshape(RAM_PAGES, PAGE_SIZE)
    assert memory_root(hash_pages(ram)) == memory_root(resolve(links, RAM_PAGES))
    held = np.count_nonzero(ram.any(axis=1)) * PAGE_SIZE
    if can_reflink(volume.root):
        assert added < 0.05 * held
        assert exclusive_bytes(image) < 0.05 * held
    else:
        assert 0.99 * held < added < 1.05 * held
    store.remove(links[-1].root)


def exclusive_bytes(path: Path) -> int:
    """Bytes of the extents that only this file has, as the kernel tells by FIEMAP."""
    printed = subprocess.check_output(["filefrag", "-v", "-b1", path], text=True)
    extents = [line.split(":") for line in printed.splitlines() if line.strip()[:1].isdigit()]
    return sum(int(fields[3]) for fields in extents if "shared" not in fields[-1])


def test_a_sparse_copy_keeps_its_holes(place: Path) -> None:
    source, target = place / "source", place / "target"
    with source.open("wb") as file:
        file.truncate(64 << 20)
        for offset in (0, 1 << 20, 63 << 20):
            file.seek(offset)
            file.write(os.urandom(3 * PAGE_SIZE))
    copy_sparse(source, target)
    assert data_pages(target) == data_pages(source)
    assert target.read_bytes() == source.read_bytes()
