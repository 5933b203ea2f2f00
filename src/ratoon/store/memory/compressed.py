"""The compressed page-set file: a memory layer at rest. Format version 1, little-endian.

::

    0        header, 64 bytes: magic "RATOONPZ", version u32, pages a frame u32,
             plain size u64, index length u64, frames u64, then zeros
    64       lengths of the frames: frames * u32
    ...      index: one zstd frame, all that is around the data in the plain form
    ...      data: zstd frames, each of 64 pages of the plain form's data, the last of the rest

It decompresses to the plain form (`pageset`), byte for byte, and its identity is the same: the
digests in the index. A frame is decompressed by itself, so few pages cost little.

No numpy here: who lists snapshots asks for the size of their layers, and for nothing else of them.
"""

from __future__ import annotations

import os
import stat
import struct
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from ratoon.compression import LEVEL, decompressed, zstd
from ratoon.errors import Corrupt, Incompatible
from ratoon.files import naming, new_file
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.positioned import read_exactly, seal, write_at

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
        lengths = array("I", bytes(4 * count))
        read_exactly(fd, memoryview(lengths).cast("B"), _HEADER.size, label)
        self._index = begin, index_length
        #: Where each frame begins, and the last one ends.
        self._bounds = array("Q", accumulate(lengths, initial=begin + index_length))
        if (end := self._bounds[-1]) != size:
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
        begin, end = self._bounds[number : number + 2]
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


def plain_size(path: Path, *, label: str) -> int:
    """How many bytes the plain form of the file at `path` has; whatever is no page set is plain.

    Corrupt: it is missing, or its header is not as it must be.
    """
    with opened(path, label) as fd:
        frames = opened_frames(fd, label)
        return frames.plain_size if frames else os.fstat(fd).st_size


def is_compressed(path: Path, *, label: str) -> bool:
    """Whether the page set at `path` lies there compressed. Corrupt."""
    with opened(path, label) as fd:
        return opened_frames(fd, label) is not None


@contextmanager
def opened(path: Path, label: str) -> Iterator[int]:
    """A file of either form, to be read. Corrupt: it is missing, or none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise Corrupt(f"{label} is missing: there is no {path}") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Corrupt(f"{label} is not a regular file: {path}")
        with naming(path):
            yield fd
    finally:
        os.close(fd)


def write_frames(
    path: Path, index: bytes, stored: int, frames: Iterable[memoryview], level: int = LEVEL
) -> int:
    """Write a new compressed page set, mode 0444, flushed; its size in bytes.

    `index` is all of the plain form but its data, `stored` how many pages that has, and `frames`
    are those: 64 at a time, the last of them the rest. A failure leaves no file.
    """
    count = -(-stored // FRAME)
    with new_file(path) as fd:
        lengths = array("I", bytes(4 * count))
        compressed = zstd.compress(index, level)
        at = _HEADER.size + 4 * count
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
