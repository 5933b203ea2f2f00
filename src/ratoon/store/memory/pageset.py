"""The page-set file: one memory layer, a base or a diff alike. Format version 2, little-endian.

::

    0        header, 64 bytes: magic "RATOONPS", version u32, page size u32,
             RAM pages u64, entries u64, stored u64, then zeros
    64       zeros
    4096     data: stored * 4096 bytes, in the order of the entries
    ...      page numbers: entries * u64, strictly increasing
    ...      digests: entries * 32 bytes, the BLAKE3 of each page

A base is the diff against all-zero RAM. A page of zeros is an entry with the zero page's digest and
no data, so `stored` counts the others. All but the data is the index; its BLAKE3, the index digest,
stands in the snapshot's manifest and so vouches for every page. The numbers and digests come last,
so that pages can be written while the next ones are hashed.

The same content can lie there compressed (`compressed`). What reads page sets reads either form.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ratoon.errors import Corrupt, Incompatible
from ratoon.store.memory.compressed import FRAME, Frames, opened, opened_frames
from ratoon.store.memory.digests import are_stored, digests_differ, hash_pages
from ratoon.store.memory.page import DIGEST_SIZE, PAGE_SIZE
from ratoon.store.memory.positioned import read_exactly
from ratoon.store.memory.ranges import run_bounds

MAGIC = b"RATOONPS"
VERSION = 2
#: Where in the file the data begins, in bytes.
DATA_OFFSET = PAGE_SIZE

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
    #: BLAKE3 of all of the file's bytes but the data, in hex.
    index_digest: str

    @cached_property
    def stored(self) -> int:
        """How many entries have data, being not all zero."""
        return int(np.count_nonzero(are_stored(self.digests)))

    @cached_property
    def stored_numbers(self) -> NDArray[np.uint64]:
        """The numbers of the pages that have data, in the order of it: uint64, shape (stored,)."""
        return self.numbers[are_stored(self.digests)]

    @cached_property
    def data_positions(self) -> NDArray[np.int64]:
        """File offset in bytes of each entry's data, -1 for pages of zeros: int64, shape (n,)."""
        stored = are_stored(self.digests)
        positions = DATA_OFFSET + (np.cumsum(stored, dtype=np.int64) - 1) * PAGE_SIZE
        positions[~stored] = -1
        return positions


def read_index(path: Path, *, label: str, expected_digest: str | None = None) -> PageIndex:
    """Read and check the index of the page set at `path`; costs no more memory than the file.

    `label` names the layer in errors ("snapshot L1, memory.bin"), `expected_digest` is the index
    digest from the manifest. Raises Corrupt where anything but page data is not as it must be, a
    missing file included, and Incompatible for another version of the format.
    """
    with opened(path, label) as fd:
        frames = opened_frames(fd, label)
        if frames:
            index = decode_index(frames.index(), frames.plain_size, label, expected_digest)
            if frames.count != -(-index.stored // FRAME):
                raise Corrupt(f"{label}: {frames.count} frames are not those of its index")
            return index
        size = os.fstat(fd).st_size
        header = bytearray(_HEADER.size)
        read_exactly(fd, memoryview(header), 0, label)
        _, entries, stored = _check_header(header, size, label)
        plain = bytearray(_index_size(entries))
        view = memoryview(plain)
        read_exactly(fd, view[:DATA_OFFSET], 0, label)
        read_exactly(fd, view[DATA_OFFSET:], DATA_OFFSET + stored * PAGE_SIZE, label)
    return decode_index(bytes(plain), size, label, expected_digest)


def plain_content(path: Path, *, label: str, piece: int) -> Iterator[bytes]:
    """The bytes of the plain form, checked against nothing, so many at a time. Corrupt."""
    with opened(path, label) as fd:
        frames = opened_frames(fd, label)
        if not frames:
            at = 0
            while data := os.pread(fd, piece, at):
                yield data
                at += len(data)
            return
        held = bytearray()
        for part in _plain_parts(frames, label):
            held += part
            whole = len(held) - len(held) % piece
            for start in range(0, whole, piece):
                yield bytes(held[start : start + piece])
            del held[:whole]
        if held:
            yield bytes(held)


def _plain_parts(frames: Frames, label: str) -> Iterator[bytes]:
    index = frames.index()
    yield index[:DATA_OFFSET]
    left = (frames.plain_size - len(index)) // PAGE_SIZE
    for number in range(frames.count):
        pages = min(left, FRAME)
        yield frames.frame(number, pages, f"{label}: frame {number}")
        left -= pages
    yield index[DATA_OFFSET:]


def read_pages(
    path: Path, index: PageIndex, entries: NDArray[np.int64] | None, *, label: str
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """Read pages in the order of `entries` (positions in `index`, shape (m,); None for all).

    Yields numbers (k,) and pages (k, 4096), a few MiB at a time, each page checked against its
    digest. Raises Corrupt naming `label` and the page where one does not match or is cut short.
    """
    if entries is None:
        entries = np.arange(len(index.numbers))
    with opened(path, label) as fd:
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


def index_bytes(index: PageIndex) -> tuple[bytes, bytes]:
    """The index as it is in the plain form, before and after the data.

    Both parts in a row have its `index_digest`.
    """
    raw = encode_index(index.ram_pages, index.numbers, index.digests, index.stored)
    return raw[:DATA_OFFSET], raw[DATA_OFFSET:]


def _index_size(entries: int) -> int:
    return DATA_OFFSET + entries * _ENTRY_SIZE


def encode_index(
    ram_pages: int, numbers: NDArray[np.uint64], digests: NDArray[np.uint8], stored: int
) -> bytes:
    header = _HEADER.pack(MAGIC, VERSION, PAGE_SIZE, ram_pages, len(numbers), stored, bytes(24))
    return header.ljust(DATA_OFFSET, b"\0") + numbers.astype("<u8").tobytes() + digests.tobytes()


def _check_header(header: bytes | bytearray, size: int, label: str) -> tuple[int, int, int]:
    """RAM pages, entries and stored, where all the header says fits a file of `size` bytes."""
    magic, version, page_size, ram_pages, entries, stored, rest = _HEADER.unpack_from(header)
    if magic != MAGIC:
        raise Corrupt(f"{label} is not a page set: it begins with {magic!r}")
    if version != VERSION:
        raise Incompatible(
            f"{label} has page-set format version {version}, this Ratoon reads version {VERSION}; "
            "use the Ratoon that made it, or make it again"
        )
    if page_size != PAGE_SIZE or any(rest):
        raise Corrupt(f"{label}: the header is damaged")
    if not 0 < ram_pages <= _MAX_RAM_PAGES or not stored <= entries <= ram_pages:
        raise Corrupt(
            f"{label}: impossible counts in the header: "
            f"{ram_pages} RAM pages, {entries} entries, {stored} stored"
        )
    expected = _index_size(entries) + stored * PAGE_SIZE
    if size != expected:
        raise Corrupt(f"{label} is {size} bytes long, its header says {expected}")
    return ram_pages, entries, stored


def decode_index(
    raw: bytes, size: int, label: str, expected_digest: str | None = None
) -> PageIndex:
    """The checked index in `raw`, all bytes but the data of a file of `size` bytes."""
    if len(raw) < _HEADER.size:
        raise Corrupt(f"{label}: the index has {len(raw)} bytes, fewer than its header")
    ram_pages, entries, _ = _check_header(raw, size, label)
    if len(raw) != _index_size(entries):
        raise Corrupt(f"{label}: the index has {len(raw)} bytes, not those of {entries} entries")
    numbers = np.frombuffer(raw, np.uint64, entries, DATA_OFFSET)
    at = DATA_OFFSET + numbers.nbytes
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
    if len(raw) + index.stored * PAGE_SIZE != size:
        raise Corrupt(f"{label}: the stored count does not match the digests")
    if any(raw[_HEADER.size : DATA_OFFSET]):
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
    ranks = (positions - DATA_OFFSET) // PAGE_SIZE
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
