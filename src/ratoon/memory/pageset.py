"""The page-set file: one memory layer, a base or a diff alike. Format version 1, little-endian.

::

    0        header, 64 bytes: magic "RATOONPS", version u32, page size u32,
             RAM pages u64, entries u64, stored u64, then zeros
    64       page numbers: entries * u64, strictly increasing
    ...      digests: entries * 32 bytes, the BLAKE3 of each page
    ...      zeros up to the next multiple of 4096, the data offset
    offset   data: stored * 4096 bytes, in the order of the entries

A base is the diff against all-zero RAM. A page of zeros is an entry with the zero page's digest and
no data, so `stored` counts the others. Everything before the data offset is the index; its BLAKE3,
the index digest, stands in the snapshot's manifest and so vouches for every page.

The same content can lie there compressed (`compressed`). What reads page sets reads either form.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ratoon.errors import Corrupt, Incompatible
from ratoon.files import naming
from ratoon.memory.compressed import FRAME, Frames, opened_frames
from ratoon.memory.digests import DIGEST_SIZE, PAGE_SIZE, are_stored, digests_differ, hash_pages
from ratoon.memory.positioned import read_exactly, write_all_at, write_at
from ratoon.memory.runs import run_bounds

MAGIC = b"RATOONPS"
VERSION = 1

_HEADER = struct.Struct("<8sIIQQQ24s")
_ENTRY_SIZE = 8 + DIGEST_SIZE
_MAX_RAM_PAGES = 2**51  # byte offsets stay below 2**63
_CHUNK = 16 * FRAME  # pages moved at a time: 4 MiB


@dataclass(frozen=True, eq=False)
class PageIndex:
    """The index of a page set: which pages it holds, and their digests."""

    #: RAM of the guest, in pages.
    ram_pages: int
    #: Page numbers, uint64, shape (n,), strictly increasing.
    numbers: NDArray[np.uint64]
    #: BLAKE3 of each page, uint8, shape (n, 32).
    digests: NDArray[np.uint8]
    #: BLAKE3 of the file's bytes before `data_offset`, in hex.
    index_digest: str

    @cached_property
    def stored(self) -> int:
        """How many entries have data, being not all zero."""
        return int(np.count_nonzero(are_stored(self.digests)))

    @cached_property
    def stored_numbers(self) -> NDArray[np.uint64]:
        """The numbers of the pages that have data, in the order of it: uint64, shape (stored,)."""
        return self.numbers[are_stored(self.digests)]

    @property
    def data_offset(self) -> int:
        """Where in the file the data begins, in bytes."""
        return _data_offset(len(self.numbers))

    @cached_property
    def data_positions(self) -> NDArray[np.int64]:
        """File offset in bytes of each entry's data, -1 for pages of zeros: int64, shape (n,)."""
        stored = are_stored(self.digests)
        positions = self.data_offset + (np.cumsum(stored, dtype=np.int64) - 1) * PAGE_SIZE
        positions[~stored] = -1
        return positions


def read_index(path: Path, *, label: str, expected_digest: str | None = None) -> PageIndex:
    """Read and check the index of the page set at `path`; costs no more memory than the file.

    `label` names the layer in errors ("snapshot L1, memory.bin"), `expected_digest` is the index
    digest from the manifest. Raises Corrupt where anything but page data is not as it must be, a
    missing file included, and Incompatible for another version of the format.
    """
    with _opened(path, label) as fd:
        frames = opened_frames(fd, label)
        if frames:
            index = _decode(frames.index(), frames.plain_size, label, expected_digest)
            if frames.count != -(-index.stored // FRAME):
                raise Corrupt(f"{label}: {frames.count} frames are not those of its index")
            return index
        size = os.fstat(fd).st_size
        header = bytearray(_HEADER.size)
        read_exactly(fd, memoryview(header), 0, label)
        _, entries = _check_header(header, size, label)
        plain = bytearray(_data_offset(entries))
        read_exactly(fd, memoryview(plain), 0, label)
    return _decode(bytes(plain), size, label, expected_digest)


def plain_size(path: Path, *, label: str) -> int:
    """How many bytes the plain form of the file at `path` has; whatever is no page set is plain.

    Corrupt: it is missing, or its header is not as it must be.
    """
    with _opened(path, label) as fd:
        frames = opened_frames(fd, label)
        return frames.plain_size if frames else os.fstat(fd).st_size


def is_compressed(path: Path, *, label: str) -> bool:
    """Whether the page set at `path` lies there compressed. Corrupt."""
    with _opened(path, label) as fd:
        return opened_frames(fd, label) is not None


def plain_content(path: Path, *, label: str, piece: int) -> Iterator[bytes]:
    """The bytes of the plain form, checked against nothing, so many at a time. Corrupt."""
    with _opened(path, label) as fd:
        frames = opened_frames(fd, label)
        if not frames:
            at = 0
            while data := os.pread(fd, piece, at):
                yield data
                at += len(data)
            return
        held = bytearray(frames.index())
        left = (frames.plain_size - len(held)) // PAGE_SIZE
        for number in range(frames.count):
            pages = min(left, FRAME)
            held += frames.frame(number, pages, f"{label}: frame {number}")
            left -= pages
            whole = len(held) - len(held) % piece
            for start in range(0, whole, piece):
                yield bytes(held[start : start + piece])
            del held[:whole]
        for start in range(0, len(held), piece):
            yield bytes(held[start : start + piece])


def read_pages(
    path: Path, index: PageIndex, entries: NDArray[np.int64] | None, *, label: str
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """Read pages in the order of `entries` (positions in `index`, shape (m,); None for all).

    Yields numbers (k,) and pages (k, 4096), a few MiB at a time, each page checked against its
    digest. Raises Corrupt naming `label` and the page where one does not match or is cut short.
    """
    if entries is None:
        entries = np.arange(len(index.numbers))
    with _opened(path, label) as fd:
        positions = index.data_positions[entries]
        frames = opened_frames(fd, label)
        if not frames:
            yield from read_checked(fd, index, entries, positions, label=label)
            return
        read = partial(_read_frames, frames, index, {}, label=label)
        yield from _checked(read, index, entries, positions, label)


def read_checked(
    fd: int,
    index: PageIndex,
    entries: NDArray[np.int64],
    positions: NDArray[np.int64],
    *,
    label: str,
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """As `read_pages`, from a file that has the data of the entries at `positions`, (m,), bytes."""
    yield from _checked(partial(_read_chunk, fd, label=label), index, entries, positions, label)


def _checked(
    read: Callable[[NDArray[np.int64], NDArray[np.uint64]], NDArray[np.uint8]],
    index: PageIndex,
    entries: NDArray[np.int64],
    positions: NDArray[np.int64],
    label: str,
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    for first in range(0, len(entries), _CHUNK):
        chunk = entries[first : first + _CHUNK]
        numbers = index.numbers[chunk]
        pages = read(positions[first : first + _CHUNK], numbers)
        bad = np.flatnonzero(digests_differ(hash_pages(pages), index.digests[chunk]))
        if len(bad):
            raise Corrupt(f"{label}: page {numbers[bad[0]]} does not match its digest")
        yield numbers, pages


def write_page_set(
    path: Path,
    ram_pages: int,
    numbers: NDArray[np.uint64],
    digests: NDArray[np.uint8],
    pages: NDArray[np.uint8],
    rows: NDArray[np.int64],
) -> PageIndex:
    """Write a new page set, mode 0444, flushed to the disk (its directory's entry is not).

    `numbers` (n,) are strictly increasing, `digests` is (n, 32), and entry `i` is `pages[rows[i]]`
    of `pages` (m, 4096), taken on trust. Raises FileExistsError, IndexError, and Corrupt for an
    index that could not be read back. A failure leaves no file.
    """
    stored = rows[are_stored(digests)]
    if len(stored) and not 0 <= stored.min() <= stored.max() < len(pages):
        raise IndexError(f"{path}: rows that the {len(pages)} pages do not have")
    runs = [
        pages[stored[start] : stored[end - 1] + 1].reshape(-1).data
        for start, end in pairwise(run_bounds(stored).tolist())
    ]
    with _written(path, ram_pages, numbers, digests) as (fd, index):
        write_all_at(fd, runs, index.data_offset)
    return index


def write_page_stream(
    path: Path,
    ram_pages: int,
    numbers: NDArray[np.uint64],
    digests: NDArray[np.uint8],
    content: Iterable[tuple[NDArray[np.uint64], NDArray[np.uint8]]],
) -> PageIndex:
    """As `write_page_set`, from `content`: page numbers (k,) and pages (k, 4096), piece by piece.

    Each page that is not all zero must come exactly once (else ValueError), in any order that
    increases within a piece. Holds one piece at a time.
    """
    with _written(path, ram_pages, numbers, digests) as (fd, index):
        stored = index.stored_numbers
        missing = np.ones(len(stored), np.bool_)
        for piece, pages in content:
            places = np.searchsorted(stored, piece)
            known = not len(piece) or places[-1] < len(stored)
            if not (known and np.array_equal(stored[places], piece) and missing[places].all()):
                raise ValueError(f"{path}: content that is not in the index, or comes twice")
            missing[places] = False
            for start, end in pairwise(run_bounds(places).tolist()):
                data = pages[start:end].reshape(-1).data
                write_at(fd, data, index.data_offset + int(places[start]) * PAGE_SIZE)
        if missing.any():
            raise ValueError(f"{path}: no content for page {stored[missing][0]}")
    return index


@contextmanager
def _written(
    path: Path, ram_pages: int, numbers: NDArray[np.uint64], digests: NDArray[np.uint8]
) -> Iterator[tuple[int, PageIndex]]:
    """A new page set, open for its data; flushed and mode 0444 afterwards, gone if that fails."""
    stored = int(np.count_nonzero(are_stored(digests)))
    raw = _encode(ram_pages, numbers, digests, stored)
    index = _decode(raw, len(raw) + stored * PAGE_SIZE, str(path))
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with naming(path), os.fdopen(fd, "wb", buffering=0):
            write_at(fd, memoryview(raw), 0)
            yield fd, index
            os.fchmod(fd, 0o444)
            os.fsync(fd)
    except BaseException:
        path.unlink()
        raise


def index_bytes(index: PageIndex) -> bytes:
    """The index as it is in the plain form, whose digest is its `index_digest`."""
    return _encode(index.ram_pages, index.numbers, index.digests, index.stored)


def _data_offset(entries: int) -> int:
    return -(-(_HEADER.size + entries * _ENTRY_SIZE) // PAGE_SIZE) * PAGE_SIZE


def _encode(
    ram_pages: int, numbers: NDArray[np.uint64], digests: NDArray[np.uint8], stored: int
) -> bytes:
    header = _HEADER.pack(MAGIC, VERSION, PAGE_SIZE, ram_pages, len(numbers), stored, bytes(24))
    index = header + numbers.astype("<u8").tobytes() + digests.tobytes()
    return index.ljust(_data_offset(len(numbers)), b"\0")


def _check_header(header: bytes | bytearray, size: int, label: str) -> tuple[int, int]:
    """RAM pages and entries, where all the header says fits a file of `size` bytes."""
    magic, version, page_size, ram_pages, entries, stored, rest = _HEADER.unpack_from(header)
    if magic != MAGIC:
        raise Corrupt(f"{label} is not a page set: it begins with {magic!r}")
    if version != VERSION:
        raise Incompatible(
            f"{label} has page-set format version {version}, this Ratoon reads version {VERSION}"
        )
    if page_size != PAGE_SIZE or any(rest):
        raise Corrupt(f"{label}: the header is damaged")
    if not 0 < ram_pages <= _MAX_RAM_PAGES or not stored <= entries <= ram_pages:
        raise Corrupt(
            f"{label}: impossible counts in the header: "
            f"{ram_pages} RAM pages, {entries} entries, {stored} stored"
        )
    expected = _data_offset(entries) + stored * PAGE_SIZE
    if size != expected:
        raise Corrupt(f"{label} is {size} bytes long, its header says {expected}")
    return ram_pages, entries


def _decode(raw: bytes, size: int, label: str, expected_digest: str | None = None) -> PageIndex:
    """The checked index in `raw`, all bytes before the data of a file of `size` bytes."""
    if len(raw) < _HEADER.size:
        raise Corrupt(f"{label}: the index has {len(raw)} bytes, fewer than its header")
    ram_pages, entries = _check_header(raw, size, label)
    if len(raw) != _data_offset(entries):
        raise Corrupt(f"{label}: the index has {len(raw)} bytes, not those of {entries} entries")
    numbers = np.frombuffer(raw, np.uint64, entries, _HEADER.size)
    at = _HEADER.size + numbers.nbytes
    digests = np.frombuffer(raw, np.uint8, entries * DIGEST_SIZE, at).reshape(-1, DIGEST_SIZE)
    index = PageIndex(ram_pages, numbers, digests, blake3(raw).hexdigest())
    if expected_digest is not None and index.index_digest != expected_digest:
        raise Corrupt(
            f"{label}: the index has digest {index.index_digest}, "
            f"its manifest says {expected_digest}"
        )
    if not np.all(numbers[1:] > numbers[:-1]):
        raise Corrupt(f"{label}: the page numbers are not in order")
    if entries and int(numbers[-1]) >= ram_pages:
        raise Corrupt(f"{label}: page {numbers[-1]} is beyond the {ram_pages} pages of RAM")
    if index.data_offset + index.stored * PAGE_SIZE != size:
        raise Corrupt(f"{label}: the stored count does not match the digests")
    if any(raw[at + digests.nbytes :]):
        raise Corrupt(f"{label}: the padding before the data is not zero")
    return index


def _read_chunk(
    fd: int, positions: NDArray[np.int64], numbers: NDArray[np.uint64], *, label: str
) -> NDArray[np.uint8]:
    """The pages whose data is at `positions`, zeros where that is -1: shape (k, 4096)."""
    stored = np.flatnonzero(positions >= 0)
    data = np.empty((len(stored), PAGE_SIZE), np.uint8)
    frames = positions[stored] // PAGE_SIZE  # data is page-aligned in the file
    for start, end in pairwise(run_bounds(frames).tolist()):
        where = f"{label}: page {numbers[stored[start]]} and those after it"
        target = data[start:end].reshape(-1).data
        read_exactly(fd, target, int(frames[start]) * PAGE_SIZE, where)
    if len(data) == len(positions):
        return data
    pages = np.zeros((len(positions), PAGE_SIZE), np.uint8)
    pages[stored] = data
    return pages


def _read_frames(
    frames: Frames,
    index: PageIndex,
    kept: dict[int, NDArray[np.uint8]],
    positions: NDArray[np.int64],
    numbers: NDArray[np.uint64],
    *,
    label: str,
) -> NDArray[np.uint8]:
    """As `_read_chunk`; `kept` is the frame that was decompressed last, by its number."""
    pages = np.zeros((len(positions), PAGE_SIZE), np.uint8)
    ranks = (positions - index.data_offset) // PAGE_SIZE
    wanted = ranks // FRAME
    for frame in np.unique(wanted[positions >= 0]).tolist():
        if frame not in kept:
            first = frame * FRAME
            count = min(FRAME, index.stored - first)
            among = index.stored_numbers[first : first + count]
            what = f"{label}: pages {among[0]} to {among[-1]}"
            data = frames.frame(frame, count, what)
            kept.clear()
            kept[frame] = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)
        rows = np.flatnonzero((wanted == frame) & (positions >= 0))
        pages[rows] = kept[frame][ranks[rows] - frame * FRAME]
    return pages


@contextmanager
def _opened(path: Path, label: str) -> Iterator[int]:
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
