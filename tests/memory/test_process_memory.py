"""Finding, reading and writing the RAM of a real process, and listing what it changed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_helpers import Guest, guest_on, u64
from ratoon.errors import MachineDied, MachineError
from ratoon.store.memory import dirty
from ratoon.store.memory.dirty import dirty_pages, is_dirty
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.process import (
    PageBuffer,
    explained,
    find_mapping,
    read_into,
    write_pages,
)

RAM = 4096
LENGTH = RAM * PAGE_SIZE
METHODS: tuple[Literal["scan"], Literal["pagemap"]] = ("scan", "pagemap")

numbers_of_pages = st.lists(st.integers(0, RAM - 1), unique=True, max_size=200).map(sorted)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose pages begin with their own number, with a hole from page 1000 to 2000."""
    path = tmp_path_factory.mktemp("image") / "ram"
    content = np.zeros((RAM, PAGE_SIZE // 8), np.uint64)
    content[:, 0] = np.arange(RAM)
    with path.open("wb") as file:
        file.write(content[:1000].tobytes())
        file.seek(2000 * PAGE_SIZE)
        file.write(content[2000:].tobytes())
    return path


@pytest.fixture
def guest(image: Path) -> Iterator[Guest]:
    with guest_on(image) as guest:
        yield guest


def start_of(guest: Guest, image: Path) -> int:
    st = image.stat()
    return find_mapping(guest.pid, st.st_dev, st.st_ino, LENGTH).start


@settings(max_examples=15, deadline=None)
@given(written=numbers_of_pages, read=numbers_of_pages)
def test_both_methods_list_exactly_the_written_pages(
    image: Path, written: list[int], read: list[int]
) -> None:
    with guest_on(image) as guest:
        guest.do(f"[ram[n * 4096] for n in {read}]")
        guest.do(f"for n in {written}: ram[n * 4096 + n] = 1")
        start = start_of(guest, image)
        for method in METHODS:
            found = dirty_pages(guest.pid, start, LENGTH, method)
            assert found.dtype == np.uint64
            assert found.tolist() == written


@pytest.mark.parametrize("pages", [1100, 2 * 8192, 2 * 8192 + 2, 40_000])
def test_more_ranges_than_one_round_of_the_ioctl(tmp_path: Path, pages: int) -> None:
    """The kernel stops each 512 ranges, and returns at 8192."""
    (tmp_path / "ram").touch()
    os.truncate(tmp_path / "ram", pages * PAGE_SIZE)
    with guest_on(tmp_path / "ram") as guest:
        guest.do(f"for n in range(1, {pages}, 2): ram[n * 4096] = 1")
        st = (tmp_path / "ram").stat()
        mapping = find_mapping(guest.pid, st.st_dev, st.st_ino, pages * PAGE_SIZE)
        for method in METHODS:
            found = dirty_pages(guest.pid, mapping.start, mapping.length, method)
            assert found.tolist() == list(range(1, pages, 2))


def test_a_part_of_the_mapping(guest: Guest, image: Path) -> None:
    guest.do("for n in (9, 10, 19, 20): ram[n * 4096] = 1")
    start = start_of(guest, image) + 10 * PAGE_SIZE
    assert dirty_pages(guest.pid, start, 10 * PAGE_SIZE).tolist() == [0, 9]
    for method in METHODS:
        assert dirty_pages(guest.pid, start, 10 * PAGE_SIZE, method).tolist() == [0, 9]


def test_pagemap_entries() -> None:
    present, swapped, file, soft_dirty = 1 << 63, 1 << 62, 1 << 61, 1 << 55
    entries = {
        0: False,  # never touched
        soft_dirty: False,
        file: False,
        present | file | 0x1234: False,  # the file's own page
        present | 0x1234: True,  # anonymous
        present | soft_dirty: True,
        swapped | 0x61: True,  # anonymous, swapped out
        swapped | file: False,  # a page of the file, being migrated
    }
    assert is_dirty(u64(list(entries))).tolist() == list(entries.values())


def test_mapping_in_several_parts_is_found_whole(guest: Guest, image: Path) -> None:
    st = image.stat()
    whole = find_mapping(guest.pid, st.st_dev, st.st_ino, LENGTH)
    guest.do("ram.madvise(mmap.MADV_DONTDUMP, 0, 40960)")
    guest.do("ram.madvise(mmap.MADV_DONTDUMP, 409600, 40960)")
    lines = Path(f"/proc/{guest.pid}/maps").read_text().splitlines()
    assert sum(line.endswith(str(image)) for line in lines) == 4
    assert find_mapping(guest.pid, st.st_dev, st.st_ino, LENGTH) == whole


def test_the_name_of_the_file_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGE_SIZE))
    st = path.stat()
    with guest_on(path) as guest:
        path.unlink()
        path.write_bytes(bytes(PAGE_SIZE))
        assert find_mapping(guest.pid, st.st_dev, st.st_ino, PAGE_SIZE).length == PAGE_SIZE
        new = path.stat()
        with pytest.raises(MachineError, match="0 times"):
            find_mapping(guest.pid, new.st_dev, new.st_ino, PAGE_SIZE)
        with pytest.raises(MachineError, match="0 times"):
            find_mapping(guest.pid, st.st_dev, st.st_ino, 2 * PAGE_SIZE)


def test_a_device_that_maps_shows_otherwise(guest: Guest, image: Path) -> None:
    st = image.stat()
    here = find_mapping(guest.pid, st.st_dev, st.st_ino, LENGTH)
    assert find_mapping(guest.pid, st.st_dev + 7, st.st_ino, LENGTH) == here


def test_a_second_or_a_shared_mapping(guest: Guest, image: Path) -> None:
    st = image.stat()
    open_it = f"fd = os.open({str(image)!r}, os.O_RDONLY)"
    guest.do(f"{open_it}; shared = mmap.mmap(fd, 0, prot=mmap.PROT_READ)")
    find_mapping(guest.pid, st.st_dev, st.st_ino, LENGTH)
    guest.do("again = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)")
    with pytest.raises(MachineError, match="2 times"):
        find_mapping(guest.pid, st.st_dev, st.st_ino, LENGTH)


def test_read_what_the_guest_wrote(guest: Guest, image: Path) -> None:
    guest.do("for n in range(0, 4096, 3): ram[n * 4096 + 9] = n % 251")
    numbers = np.arange(0, RAM, dtype=np.uint64)
    numbers = numbers[numbers % 7 != 0]  # runs of six
    buffer = PageBuffer()
    out = buffer.view(len(numbers))
    read_into(guest.pid, start_of(guest, image), numbers, out)
    assert out[:, 9].tolist() == [n % 251 if n % 3 == 0 else 0 for n in numbers.tolist()]
    in_file = np.where((numbers >= 1000) & (numbers < 2000), 0, numbers)
    assert np.array_equal(out.view(np.uint64)[:, 0], in_file)


def test_more_runs_than_one_call_takes(guest: Guest, image: Path) -> None:
    numbers = np.arange(1, RAM, 2, dtype=np.uint64)
    out = np.empty((len(numbers), PAGE_SIZE), np.uint8)
    read_into(guest.pid, start_of(guest, image), numbers, out)
    assert out.view(np.uint64)[:3, 0].tolist() == [1, 3, 5]
    assert out.view(np.uint64)[-1, 0] == RAM - 1


def test_written_pages_are_the_processes_own(guest: Guest, image: Path) -> None:
    before = image.read_bytes()
    start = start_of(guest, image)
    numbers = u64([0, 1, 500, 1500, RAM - 1])
    pages = np.random.default_rng(1).integers(0, 256, (5, PAGE_SIZE), np.uint8)
    write_pages(guest.pid, start, numbers, pages)

    out = np.empty_like(pages)
    read_into(guest.pid, start, numbers, out)
    assert np.array_equal(out, pages)
    guest.do(f"assert ram[500 * 4096] == {pages[2, 0]}")
    assert dirty_pages(guest.pid, start, LENGTH).tolist() == numbers.tolist()
    assert image.read_bytes() == before


def test_a_page_that_is_not_there_is_named(guest: Guest, image: Path) -> None:
    guest.do("import ctypes; libc = ctypes.CDLL(None)")
    start = start_of(guest, image)
    guest.do(f"assert libc.mprotect(ctypes.c_void_p({start + 6 * PAGE_SIZE}), 4096, 0) == 0")
    out = np.empty((10, PAGE_SIZE), np.uint8)
    with pytest.raises(MachineError, match="page 6"):
        read_into(guest.pid, start, np.arange(10, dtype=np.uint64), out)
    with pytest.raises(MachineError, match="page 6"):
        write_pages(guest.pid, start, np.arange(10, dtype=np.uint64), out)


def test_the_wrong_shape_is_refused(guest: Guest) -> None:
    with pytest.raises(ValueError, match="no room"):
        read_into(guest.pid, 0, u64([1, 2]), np.empty((3, PAGE_SIZE), np.uint8))
    with pytest.raises(ValueError, match="not 2 pages"):
        write_pages(guest.pid, 0, u64([1, 2]), np.empty((4, PAGE_SIZE), np.uint8)[::2])


@pytest.mark.parametrize("reap", [True, False], ids=["gone", "zombie"])
def test_a_dead_process(image: Path, reap: bool) -> None:
    st = image.stat()
    with guest_on(image) as guest:
        start = start_of(guest, image)
        barred = PermissionError(errno.EACCES, "as to root of a user namespace")
        with pytest.raises(MachineError, match="cannot look"), explained(guest.pid, "look"):
            raise barred
        guest.kill(reap=reap)
        if not reap:
            os.waitid(os.P_PID, guest.pid, os.WEXITED | os.WNOWAIT)
        gone = f"process {guest.pid} is gone"
        out = np.empty((1, PAGE_SIZE), np.uint8)
        for method in METHODS:
            with pytest.raises(MachineDied, match=gone):
                dirty_pages(guest.pid, start, LENGTH, method)
        with pytest.raises(MachineDied, match=gone):
            find_mapping(guest.pid, st.st_dev, st.st_ino, LENGTH)
        with pytest.raises(MachineDied, match=gone):
            read_into(guest.pid, start, u64([0]), out)
        with pytest.raises(MachineDied, match=gone):
            write_pages(guest.pid, start, u64([0]), out)
        with pytest.raises(MachineDied, match=gone), explained(guest.pid, "look"):
            raise barred


@pytest.mark.parametrize("method", METHODS)
def test_a_process_that_dies_during_the_scan(
    image: Path, method: Literal["scan", "pagemap"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its page tables are empty then, which must not pass for a guest that changed nothing."""
    with guest_on(image) as guest:
        start = start_of(guest, image)
        pagemap = dirty._pagemap

        @contextmanager
        def opened_too_late(pid: int) -> Iterator[int]:
            with pagemap(pid) as fd:
                guest.kill()
                yield fd

        monkeypatch.setattr(dirty, "_pagemap", opened_too_late)
        with pytest.raises(MachineDied, match="is gone"):
            dirty_pages(guest.pid, start, LENGTH, method)


def test_buffer_grows_and_is_touched() -> None:
    buffer = PageBuffer()
    buffer.reserve(10)
    small = buffer.view(10)
    small[:] = 7
    assert buffer.view(3).ctypes.data == small.ctypes.data
    big = buffer.view(10_000)
    big[:] = 1
    assert big.shape == (10_000, PAGE_SIZE)
    assert (small == 7).all()  # an old view stays what it was
    assert buffer.view(0).shape == (0, PAGE_SIZE)
    buffer.reserve(20_000)
    own = buffer.view(20_000)
    assert len(dirty_pages(os.getpid(), own.ctypes.data, own.nbytes)) == 20_000
