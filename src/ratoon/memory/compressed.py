"""The compressed page-set file: a memory layer at rest. Format version 1, little-endian.

::

    0        header, 64 bytes: magic "RATOONPZ", version u32, pages a frame u32,
             plain size u64, index length u64, frames u64, then zeros
    64       lengths of the frames: frames * u32
    ...      index: one zstd frame, all that is around the data in the plain form
    ...      data: zstd frames, each of 64 pages of the plain form's data, the last of the rest

It decompresses to the plain form (`pageset`), byte for byte, and its identity is the same: the
digests in the index. A frame is decompressed by itself, so few pages cost little.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ratoon.compression import LEVEL, decompressed, zstd
from ratoon.errors import Corrupt, Incompatible
from ratoon.memory.digests import PAGE_SIZE
from ratoon.memory.positioned import new_file, read_exactly, seal, write_at

#: Pages in a frame, 256 KiB of them.
FRAME = 64
LEVELS = range(1, 20)

_MAGIC = b"RATOONPZ"
_VERSION = 1
_HEADER = struct.Struct("<8sIIQQQ24s")
_MAX_PLAIN = 1 << 62


class Frames:
    """A compressed page set that is open at `fd`, which stays the caller's."""

    def __init__(self, fd: int, label: str) -> None:
        """Corrupt, Incompatible: what stands before the index is not as it must be."""
        size = os.fstat(fd).st_size
        header = bytearray(_HEADER.size)
        read_exactly(fd, memoryview(header), 0, label)
        _, version, frame, plain_size, index_length, count, rest = _HEADER.unpack(header)
        if version != _VERSION:
            raise Incompatible(
                f"{label} has compressed page-set format version {version}, "
                f"this Ratoon reads version {_VERSION}"
            )
        begin = _HEADER.size + 4 * count
        if frame != FRAME or any(rest) or begin + index_length > size or plain_size > _MAX_PLAIN:
            raise Corrupt(f"{label}: the header of the compressed file is damaged")
        lengths = np.empty(count, "<u4")
        read_exactly(fd, lengths.view(np.uint8).data, _HEADER.size, label)
        self._index = begin, index_length
        #: Where each frame begins, and the last one ends.
        self._bounds = begin + index_length + np.concatenate(([0], np.cumsum(lengths, dtype=int)))
        if (end := int(self._bounds[-1])) != size:
            raise Corrupt(f"{label} is {size} bytes long, its compressed frames end at {end}")
        self._fd = fd
        self._label = label
        #: Bytes of the plain form.
        self.plain_size: int = plain_size
        #: How many frames of pages.
        self.count: int = count

    def index(self) -> bytes:
        """All of the plain form but its data; not checked any further. Corrupt."""
        begin, length = self._index
        what = f"{self._label}: the compressed index"
        return self._decompressed(begin, length, self.plain_size, what)

    def frame(self, number: int, pages: int, what: str) -> bytes:
        """One frame, which must have so many pages. Corrupt, naming `what` it is."""
        begin, end = (int(bound) for bound in self._bounds[number : number + 2])
        data = self._decompressed(begin, end - begin, pages * PAGE_SIZE, what)
        if len(data) != pages * PAGE_SIZE:
            raise Corrupt(f"{what} cannot be decompressed: it is too short")
        return data

    def _decompressed(self, offset: int, length: int, at_most: int, what: str) -> bytes:
        raw = bytearray(length)
        read_exactly(self._fd, memoryview(raw), offset, what)
        return decompressed(raw, at_most, what)


def opened_frames(fd: int, label: str) -> Frames | None:
    """The compressed page set that is open at `fd`; None: it is none. Corrupt, Incompatible."""
    return Frames(fd, label) if os.pread(fd, len(_MAGIC), 0) == _MAGIC else None


def write_frames(
    path: Path, index: bytes, stored: int, frames: Iterable[memoryview], level: int = LEVEL
) -> int:
    """Write a new compressed page set, mode 0444, flushed; its size in bytes.

    `index` is all of the plain form but its data, `stored` how many pages that has, and `frames`
    are those: 64 at a time, the last of them the rest. A failure leaves no file.
    """
    count = -(-stored // FRAME)
    with new_file(path) as fd:
        lengths = np.zeros(count, "<u4")
        compressed = zstd.compress(index, level)
        at = _HEADER.size + lengths.nbytes
        write_at(fd, memoryview(compressed), at)
        at += len(compressed)
        for number, data in enumerate(zstd.compress(frame, level) for frame in frames):
            write_at(fd, memoryview(data), at)
            lengths[number] = len(data)
            at += len(data)
        plain = len(index) + stored * PAGE_SIZE
        header = (_MAGIC, _VERSION, FRAME, plain, len(compressed), count, bytes(24))
        write_at(fd, memoryview(_HEADER.pack(*header) + lengths.tobytes()), 0)
        seal(fd)
    return at
