"""How much of what the guest sees of its disk differs between two chains of layers."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon.store.disk.flatten import allocated_above

#: Bytes that count as changed together.
GRAIN = 4096

_CHUNK = 4 << 20


def changed_bytes(
    chains: tuple[Sequence[Path], Sequence[Path]], flat: tuple[Path, Path], shared: int
) -> int:
    """Bytes of the disk that differ, in whole grains of 4096.

    `chains` are two disks' layers, base first, of which the first `shared` are the same; `flat` are
    the same disks as raw files. Content is read only where a layer that is not shared has anything.
    What a shorter disk lacks counts as zeros.
    """
    extents = [extent for layers in chains for extent in allocated_above(layers, shared)]
    stretches = [(extent.start, extent.start + extent.length) for extent in extents]
    changed = 0
    with flat[0].open("rb") as left, flat[1].open("rb") as right:
        for start, end in _in_grains(stretches):
            # A disk is mostly holes, which both have in the same places.
            data = [part for file in (left, right) for part in _data(file.fileno(), start, end)]
            for first, last in _in_grains(data):
                for at in range(first, last, _CHUNK):
                    length = min(_CHUNK, last - at)
                    differ = _read(left.fileno(), length, at) != _read(right.fileno(), length, at)
                    changed += int(np.count_nonzero(differ.any(axis=1))) * GRAIN
    return changed


def _read(fd: int, length: int, offset: int) -> NDArray[np.uint64]:
    """Whole grains as words, shape (grains, 512); zeros beyond the end of the file."""
    raw = os.pread(fd, length, offset).ljust(length, b"\0")
    return np.frombuffer(raw, np.uint64).reshape(-1, GRAIN // 8)


def _data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has data between `start` and `end`."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # none from here on
                return
            raise
        if start < end:
            hole = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, min(hole, end)
            start = hole


def _in_grains(stretches: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What the stretches cover together, in order, each byte once, widened to whole grains."""
    start = end = 0
    for first, last in sorted(stretches):
        if first // GRAIN * GRAIN > end:
            if end > start:
                yield start, end
            start = first // GRAIN * GRAIN
        end = max(end, -(-last // GRAIN) * GRAIN)
    if end > start:
        yield start, end
