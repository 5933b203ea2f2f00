"""The memory of another process: where its RAM is mapped, and moving pages out of it and into it.

The caller needs the right to trace the process: the same user, or root.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon import syscalls
from ratoon.errors import MachineDied, MachineError
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.ranges import run_bounds

_IOV_MAX = 1024
_WINDOW = 16 * 1024  # pages considered for one call: 64 MiB
_GROWTH = 4096  # pages a buffer grows by: 16 MiB


@dataclass(frozen=True)
class Mapping:
    """Where a process has a guest's RAM: address and length, in bytes."""

    start: int
    length: int


@dataclass(frozen=True)
class _Area:
    """A line of /proc/PID/maps, or several adjacent ones merged. Bytes, `offset` in the file."""

    start: int
    end: int
    offset: int

    def continues(self, before: _Area) -> bool:
        return self.start == before.end and self.offset - before.offset == before.end - before.start


def find_mapping(pid: int, device: int, inode: int, length: int) -> Mapping:
    """Where process `pid` has the first `length` bytes of a file mapped privately.

    `device` and `inode` are the file's `st_dev` and `st_ino`; its name may be gone. Raises
    MachineError where it is not mapped exactly once, MachineDied where there is no such process.
    """
    with explained(pid, "find the RAM"):
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    if not maps:  # a zombie
        raise MachineDied(f"process {pid} is gone")
    found = [
        area
        for area in _merge(_private_areas(maps, device, inode))
        if area.offset == 0 and area.end - area.start >= length
    ]
    if len(found) != 1:
        raise MachineError(
            f"process {pid} maps the RAM image (inode {inode}, {length} bytes) privately "
            f"and as a whole {len(found)} times, not once"
        )
    return Mapping(found[0].start, length)


def read_into(pid: int, start: int, numbers: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
    """Copy pages of process `pid` to `out`, uint8, shape (n, 4096), C-contiguous.

    `numbers`, shape (n,), count from the address `start`. Raises MachineDied where the process is
    gone, MachineError where a page cannot be read. A running process gives a torn copy.
    """
    if not out.flags.c_contiguous or out.shape != (len(numbers), PAGE_SIZE):
        raise ValueError(f"no room for {len(numbers)} pages in shape {out.shape}")
    with explained(pid, "read the RAM"):
        _transfer(syscalls.read_process, pid, start, numbers, out.ctypes.data)


def write_pages(
    pid: int, start: int, numbers: NDArray[np.uint64], pages: NDArray[np.uint8]
) -> None:
    """Copy `pages`, uint8, shape (n, 4096), C-contiguous, into process `pid`; see `read_into`.

    Its mapping must be writable. What is mapped privately becomes a page of that process alone.
    """
    if not pages.flags.c_contiguous or pages.shape != (len(numbers), PAGE_SIZE):
        raise ValueError(f"not {len(numbers)} pages: shape {pages.shape}")
    with explained(pid, "write the RAM"):
        _transfer(syscalls.write_process, pid, start, numbers, pages.ctypes.data)


class PageBuffer:
    """Room for pages that is used again and again, so that copying a VM's pages meets no fault.

    The first touch of fresh memory costs more than the copy itself, and a VM is paused meanwhile:
    `reserve` beforehand. One user at a time.
    """

    def __init__(self) -> None:
        self._pages = np.empty((0, PAGE_SIZE), np.uint8)

    def __len__(self) -> int:
        """For how many pages it has room."""
        return len(self._pages)

    def reserve(self, n_pages: int) -> None:
        """Have room for at least `n_pages`, touched; where it grows, its content is not kept."""
        if n_pages <= len(self._pages):
            return
        rounded = -(-n_pages // _GROWTH) * _GROWTH
        self._pages = np.empty((0, PAGE_SIZE), np.uint8)  # let go of the old room first
        room = mmap.mmap(-1, rounded * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            room.madvise(mmap.MADV_HUGEPAGE)  # six times faster to touch than MAP_POPULATE
        self._pages = np.frombuffer(room, np.uint8).reshape(-1, PAGE_SIZE)
        self._pages[:, 0] = 0

    def view(self, n_pages: int) -> NDArray[np.uint8]:
        """The first `n_pages`, reserved if need be: uint8, shape (n_pages, 4096)."""
        self.reserve(n_pages)
        return self._pages[:n_pages]


@contextmanager
def explained(pid: int, action: str) -> Iterator[None]:
    """Turn an OSError from looking into process `pid` into MachineDied or MachineError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.ENOENT) or _has_ended(pid):
            raise MachineDied(f"process {pid} is gone") from error
        raise MachineError(f"cannot {action} of process {pid}: {error.strerror}") from error


def _has_ended(pid: int) -> bool:
    """Whether it waits to be waited for: in a user namespace it may not be looked into then."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _private_areas(maps: str, device: int, inode: int) -> list[_Area]:
    areas: dict[str, list[_Area]] = {}
    for line in maps.rstrip().split("\n"):  # a path may hold what splitlines() splits at
        span, permissions, offset, dev, number = line.split(maxsplit=5)[:5]
        if int(number) == inode and permissions.endswith("p"):
            start, end = (int(address, 16) for address in span.split("-"))
            areas.setdefault(dev, []).append(_Area(start, end, int(offset, 16)))
    # btrfs and overlayfs show another device here than `stat` does: then the inode must do.
    every = [area for group in areas.values() for area in group]
    return areas.get(f"{os.major(device):02x}:{os.minor(device):02x}", every)


def _merge(areas: list[_Area]) -> list[_Area]:
    """Join what `mprotect` or `madvise` on a part has split."""
    merged: list[_Area] = []
    for area in areas:
        if merged and area.continues(merged[-1]):
            merged[-1] = replace(merged[-1], end=area.end)
        else:
            merged.append(area)
    return merged


def _transfer(
    call: Callable[..., int], pid: int, start: int, numbers: NDArray[np.uint64], address: int
) -> None:
    """Move pages between `address` here, packed, and their places in the process."""
    done = 0
    while done < len(numbers):
        remote = _iovecs(start, numbers[done : done + _WINDOW])[:_IOV_MAX]
        local = np.array([[address + done * PAGE_SIZE, remote[:, 1].sum()]], np.uint64)
        try:
            moved = call(pid, local.ctypes.data, 1, remote.ctypes.data, len(remote))
        except OSError as error:
            raise OSError(error.errno, f"page {numbers[done]}: {error.strerror}") from None
        if moved < PAGE_SIZE:
            raise MachineError(f"process {pid}: page {numbers[done]} moved {moved} bytes only")
        # After a short transfer the next call begins at what stopped this one, and says why.
        done += moved // PAGE_SIZE


def _iovecs(start: int, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`struct iovec` (address, bytes) for each run of `numbers`: uint64, shape (runs, 2)."""
    bounds = run_bounds(numbers)
    iovecs = np.empty((len(bounds) - 1, 2), np.uint64)
    iovecs[:, 0] = numbers[bounds[:-1]] * np.uint64(PAGE_SIZE) + np.uint64(start)
    iovecs[:, 1] = np.diff(bounds) * PAGE_SIZE
    return iovecs
