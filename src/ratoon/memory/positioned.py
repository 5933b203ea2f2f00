"""Reads and writes at a place in a file, however many calls they take."""

from __future__ import annotations

import os

from ratoon.errors import Corrupt


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
