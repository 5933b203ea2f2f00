"""Reads and writes at a place in a file, however many calls they take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from ratoon import syscalls
from ratoon.errors import Corrupt

#: How many pieces one call takes (IOV_MAX).
_AT_ONCE = 1024


def seal(fd: int) -> None:
    """Nobody is to write to it any more: mode 0444, flushed."""
    os.fchmod(fd, 0o444)
    os.fsync(fd)


def read_exactly(fd: int, target: memoryview, offset: int, what: str) -> None:
    """Fill the flat `target` from `offset` on; Corrupt, naming `what`, if the file ends before."""
    while target:
        count = os.preadv(fd, [target], offset)
        if count == 0:
            raise Corrupt(f"{what}: cut short, the file ends at byte {offset}")
        target, offset = target[count:], offset + count


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes of the flat `data` at `offset`."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def write_all_at(fd: int, pieces: Sequence[memoryview], offset: int) -> None:
    """Write flat pieces one after the other, from `offset` on."""
    for first in range(0, len(pieces), _AT_ONCE):
        batch = pieces[first : first + _AT_ONCE]
        written = os.pwritev(fd, batch, offset)
        for piece in batch:
            taken = min(written, len(piece))
            write_at(fd, piece[taken:], offset + taken)
            offset, written = offset + len(piece), written - taken


def start_flushing(fd: int, offset: int, length: int) -> None:
    """Have the disk begin to take what was written there; a promise of nothing.

    Where it cannot begin early (sync_file_range(2)), the fsync that is to follow has more to do.
    """
    if length:
        with suppress(OSError):
            syscalls.start_flushing(fd, offset, length)
