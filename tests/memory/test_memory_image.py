"""Images: made once, from checked pages, and trusted only while their stamp holds."""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from memory_helpers import RAM, chains, flatten, ram_of, write_chain, write_layer
from ratoon.errors import ChainMismatch, Corrupt
from ratoon.files import locked
from ratoon.store.memory import image as image_module
from ratoon.store.memory.digests import hash_pages, memory_root, zero_array
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import DATA_OFFSET

CHAIN = [{1: 1, 2: 2, 9: 3}, {2: 0, 5: 4}, {60: 5}]


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


def names(store: ImageStore) -> list[str]:
    return sorted(p.name for p in store.directory.iterdir() if p.suffix != ".lock")


def data_in(path: Path) -> list[int]:
    """The pages of a sparse file that are not holes."""
    with path.open("rb") as file:
        pages = range(path.stat().st_size // PAGE_SIZE)
        return [n for n in pages if not is_hole(file.fileno(), n * PAGE_SIZE)]


def is_hole(fd: int, offset: int) -> bool:
    return os.lseek(fd, offset, os.SEEK_HOLE) == offset


@settings(max_examples=25, deadline=None)
@given(chains)
def test_an_image_is_the_merged_memory(chain: list[dict[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        links = write_chain(Path(directory), chain)
        store = ImageStore(Path(directory, "images"))
        path = store.make(links, RAM)
        ram = ram_of(flatten(chain))
        assert path.read_bytes() == ram.tobytes()
        assert data_in(path) == np.flatnonzero(ram.any(axis=1)).tolist()
        assert store.find(links[-1].root, RAM) == path
        assert memory_root(hash_pages(ram)) == path.stem


def test_file_names_and_modes_whatever_the_umask(tmp_path: Path, store: ImageStore) -> None:
    links = write_chain(tmp_path, CHAIN)
    before = os.umask(0o027)
    try:
        path = store.make(links, RAM)
    finally:
        os.umask(before)
    assert names(store) == [f"{links[-1].root}.json", f"{links[-1].root}.ram"]
    assert path.stat().st_mode & 0o777 == 0o444


def test_no_links_are_all_holes(store: ImageStore) -> None:
    path = store.make((), RAM)
    assert path.stem == memory_root(zero_array(RAM))
    assert path.stat().st_size == RAM * PAGE_SIZE
    assert path.stat().st_blocks == 0


def test_one_size_of_ram_is_not_another(tmp_path: Path, store: ImageStore) -> None:
    links = write_chain(tmp_path, CHAIN)
    store.make(links, RAM)
    assert store.find(links[-1].root, 2 * RAM) is None


def test_eight_threads_make_it_once(
    tmp_path: Path, store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = write_chain(tmp_path, CHAIN)
    written = []
    write = image_module._write_image

    def counting(path: Path, *args: object) -> None:
        written.append(path)
        write(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(image_module, "_write_image", counting)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: store.make(links, RAM), range(8)))
    assert len(written) == 1
    assert len(set(paths)) == 1


def test_processes_make_it_once(tmp_path: Path, store: ImageStore) -> None:
    script = (
        "import sys; from pathlib import Path; from ratoon.store.memory.image import ImageStore;"
        "print(ImageStore(Path(sys.argv[1])).make((), 4096).stat().st_ino)"
    )
    command = [sys.executable, "-c", script, str(store.directory)]
    makers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({maker.communicate()[0] for maker in makers}) == 1
    assert all(maker.returncode == 0 for maker in makers)


def test_a_touched_image_is_made_again_under_its_users(tmp_path: Path, store: ImageStore) -> None:
    links = write_chain(tmp_path, CHAIN)
    path = store.make(links, RAM)
    root, inode = links[-1].root, path.stat().st_ino
    with path.open("rb") as file:
        user = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    stat = path.stat()
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"!")
    path.chmod(0o444)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the ctime still tells

    assert store.find(root, RAM) is None
    assert store.make(links, RAM) == path
    assert path.stat().st_ino != inode
    assert path.read_bytes() == ram_of(flatten(CHAIN)).tobytes()
    assert user[8:9] == b"!"
    user.close()


def test_a_copied_store_is_not_trusted(tmp_path: Path, store: ImageStore) -> None:
    links = write_chain(tmp_path, CHAIN)
    store.make(links, RAM)
    shutil.copytree(store.directory, tmp_path / "copy", copy_function=shutil.copy2)
    assert ImageStore(tmp_path / "copy").find(links[-1].root, RAM) is None


@pytest.mark.parametrize("stamp", [b"", b"{", b"[[[[[[" * 9999, b"\xff\0", b"{}", b"null", None])
def test_an_odd_stamp_is_no_image(tmp_path: Path, store: ImageStore, stamp: bytes | None) -> None:
    links = write_chain(tmp_path, CHAIN)
    path = store.make(links, RAM)
    if stamp is None:
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_bytes(stamp)
    assert store.find(links[-1].root, RAM) is None
    store.make(links, RAM)
    assert store.find(links[-1].root, RAM) == path


def test_a_stamp_of_another_root_is_no_image(tmp_path: Path, store: ImageStore) -> None:
    links = write_chain(tmp_path, CHAIN)
    path = store.make(links, RAM)
    other = "f" * 64
    path.rename(store.directory / f"{other}.ram")
    path.with_suffix(".json").rename(store.directory / f"{other}.json")
    assert store.find(other, RAM) is None


def test_a_damaged_layer_leaves_nothing(tmp_path: Path, store: ImageStore) -> None:
    links = write_chain(tmp_path, CHAIN)
    links[0].path.chmod(0o600)
    with links[0].path.open("r+b") as file:
        file.seek(DATA_OFFSET + 2 * PAGE_SIZE)
        file.write(b"!")
    with pytest.raises(Corrupt, match="snapshot L0, memory layer: page 9 "):
        store.make(links, RAM)
    assert names(store) == []


def test_a_mismatched_chain_is_refused_and_leaves_nothing(
    tmp_path: Path, store: ImageStore
) -> None:
    links = write_chain(tmp_path, CHAIN)
    links[1] = replace(links[1], index=write_layer(tmp_path / "other", {9: 1}))
    with pytest.raises(ChainMismatch, match="L1"):
        store.make(links, RAM)
    assert names(store) == []


def test_nearest_is_the_longest_beginning_with_an_image(tmp_path: Path, store: ImageStore) -> None:
    links = write_chain(tmp_path, CHAIN)

    def nearest(depth: int) -> tuple[Path, int]:
        image, covered = store.nearest(links[:depth], RAM)
        with image:
            return image.path, covered

    zero, covered = nearest(3)
    assert (covered, zero.stat().st_blocks) == (0, 0)
    first = store.make(links[:1], RAM)
    assert nearest(3) == (first, 1)
    head = store.make(links, RAM)
    assert nearest(3) == (head, 3)
    assert nearest(2) == (first, 1)


def test_remove(tmp_path: Path, store: ImageStore) -> None:
    links = write_chain(tmp_path, CHAIN)
    store.make(links, RAM)
    for _ in range(2):
        store.remove(links[-1].root)
        assert store.find(links[-1].root, RAM) is None
        assert names(store) == []


def test_litter_of_a_crash(tmp_path: Path, store: ImageStore) -> None:
    links = write_chain(tmp_path, CHAIN)
    root = links[-1].root
    litter = store.directory / f".{root}.ram.tmp"
    litter.touch()
    with locked(store.directory / f".{root[:2]}.lock"):
        store.sweep()  # someone is at work on it
        assert litter.exists()
    store.sweep()
    assert not litter.exists()
    litter.touch()
    assert store.make(links, RAM).read_bytes() == ram_of(flatten(CHAIN)).tobytes()
    assert not litter.exists()
