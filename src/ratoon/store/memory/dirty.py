"""Which pages of a private file mapping its process has changed: those that are anonymous by now.

No tracking has to be switched on for that; the page tables know. Two ways to ask, same answer:

- the PAGEMAP_SCAN ioctl, Linux 6.7 and later: the kernel returns ranges;
- reading /proc/PID/pagemap: 8 bytes for each page.

See Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/fs.h of the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ratoon.errors import MachineDied
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.process import explained

# An entry of /proc/PID/pagemap. A swapped page is not present and has bit 62; so has a page that
# is just being migrated, whose bit 61 still tells what it is.
_PRESENT = np.uint64(1 << 63)
_SWAPPED = np.uint64(1 << 62)
_FILE = np.uint64(1 << 61)
_ENTRY_SIZE = 8
_CHUNK = 128 * 1024  # entries read at a time: 1 MiB

# struct pm_scan_arg: size, flags, start, end, walk_end, vec, vec_len, max_pages,
# category_inverted, category_mask, category_anyof_mask, return_mask
_SCAN_ARG = struct.Struct("=12Q")
_PAGEMAP_SCAN = 3 << 30 | _SCAN_ARG.size << 16 | ord("f") << 8 | 16  # _IOWR('f', 16, pm_scan_arg)
_PAGE_IS_FILE = 1 << 2
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4
_REGIONS = 8192  # struct page_region: start, end, categories


def dirty_pages(
    pid: int, start: int, length: int, method: Literal["auto", "scan", "pagemap"] = "auto"
) -> NDArray[np.uint64]:
    """The changed pages of process `pid` in the private file mapping at `start`.

    `start` and `length` are in bytes, multiples of 4096. Returns page numbers counted from `start`,
    sorted, uint64, shape (n,). A page in swap counts: only anonymous pages are ever swapped. Raises
    MachineDied where the process is gone, MachineError where it may not be looked into.
    """
    if method == "auto":
        method = "scan" if scan_supported() else "pagemap"
    look = _scan if method == "scan" else _read_pagemap
    with explained(pid, "list the changed pages"), _pagemap(pid) as fd:
        numbers = look(fd, start, length)
        # Of a process that has died in the meantime the page tables are empty, without an error.
        if not os.pread(fd, _ENTRY_SIZE, start // PAGE_SIZE * _ENTRY_SIZE):
            raise MachineDied(f"process {pid} is gone")
    return numbers


def is_dirty(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which pagemap entries, shape (n,), are of anonymous pages, in memory or in swap: bool."""
    dirty: NDArray[np.bool_] = (entries & (_PRESENT | _SWAPPED) != 0) & (entries & _FILE == 0)
    return dirty


@contextmanager
def _pagemap(pid: int | str) -> Iterator[int]:
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _read_pagemap(fd: int, start: int, length: int) -> NDArray[np.uint64]:
    first, pages = start // PAGE_SIZE, length // PAGE_SIZE
    found = [np.zeros(0, np.uint64)]
    for at in range(0, pages, _CHUNK):
        count = min(_CHUNK, pages - at)
        raw = os.pread(fd, count * _ENTRY_SIZE, (first + at) * _ENTRY_SIZE)
        found.append(np.flatnonzero(is_dirty(np.frombuffer(raw, np.uint64))).astype(np.uint64) + at)
    return np.concatenate(found)


def _scan(fd: int, start: int, length: int) -> NDArray[np.uint64]:
    regions = np.empty((_REGIONS, 3), np.uint64)
    found = [np.zeros(0, np.uint64)]
    at, end = start, start + length
    while at < end:
        # (present or swapped) and not file
        argument = _SCAN_ARG.pack(
            *(_SCAN_ARG.size, 0, at, end, 0, regions.ctypes.data, _REGIONS, 0),
            *(_PAGE_IS_FILE, _PAGE_IS_FILE, _PAGE_IS_PRESENT | _PAGE_IS_SWAPPED, 0),
        )
        count = fcntl.ioctl(fd, _PAGEMAP_SCAN, bytearray(argument))
        found.append(_expand((regions[:count, :2] - np.uint64(start)) // np.uint64(PAGE_SIZE)))
        # Not from walk_end: Linux 6.18 leaves it at an earlier place than it got to if it found
        # more than 512 regions, and pages would be listed twice.
        at = int(regions[-1, 1]) if count == _REGIONS else end
    return np.concatenate(found)


def _expand(ranges: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """All numbers in the half-open `ranges`, shape (n, 2)."""
    sizes = ranges[:, 1] - ranges[:, 0]
    before = np.cumsum(sizes) - sizes
    total = int(sizes.sum())
    return np.repeat(ranges[:, 0] - before, sizes.astype(np.int64)) + np.arange(
        total, dtype=np.uint64
    )


@cache
def scan_supported() -> bool:
    with _pagemap("self") as fd:
        try:
            _scan(fd, 0, PAGE_SIZE)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return False
            raise
    return True
