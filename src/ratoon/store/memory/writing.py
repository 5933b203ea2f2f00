"""Writing page sets: piece by piece, or as a stream; on the disk and read-only at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon.files import new_file
from ratoon.store.memory.digests import Piece, are_stored
from ratoon.store.memory.page import DIGEST_SIZE, PAGE_SIZE
from ratoon.store.memory.pageset import DATA_OFFSET, PageIndex, decode_index, encode_index
from ratoon.store.memory.positioned import seal, start_flushing, write_all_at, write_at
from ratoon.store.memory.ranges import run_bounds


def write_page_set(
    path: Path,
    ram_pages: int,
    numbers: NDArray[np.uint64],
    digests: NDArray[np.uint8],
    pages: NDArray[np.uint8],
    rows: NDArray[np.int64],
) -> PageIndex:
    """As `writing_page_set`, of one piece; returns once it is flushed."""
    with writing_page_set(path, ram_pages, [(numbers, digests, rows, pages)]) as index:
        pass
    return index


@contextmanager
def writing_page_set(path: Path, ram_pages: int, pieces: Iterable[Piece]) -> Iterator[PageIndex]:
    """Write a new page set, mode 0444; with the end of the block it is on the disk.

    Its directory's entry is not. `pieces` are in the order of the page numbers, and taken on trust;
    what came is written, and the disk at work, while the next one is made. In the block all is
    written but the end, and being flushed. Raises FileExistsError, IndexError, and Corrupt for an
    index that could not be read back. A failure, of the block too, leaves no file.
    """
    entries = [(np.empty(0, np.uint64), np.empty((0, DIGEST_SIZE), np.uint8))]
    jobs, at = [], DATA_OFFSET
    with new_file(path) as fd, ThreadPoolExecutor(1) as writer:
        for numbers, digests, rows, pages in pieces:
            stored = rows[are_stored(digests)]
            if len(stored) and not 0 <= stored.min() <= stored.max() < len(pages):
                raise IndexError(f"{path}: rows that the {len(pages)} pages do not have")
            runs = [
                pages[stored[start] : stored[end - 1] + 1].reshape(-1).data
                for start, end in pairwise(run_bounds(stored).tolist())
            ]
            jobs.append(writer.submit(_write_data, fd, runs, at))
            at += len(stored) * PAGE_SIZE
            entries.append((numbers, digests))
        numbers, digests = (np.concatenate(part) for part in zip(*entries, strict=True))
        raw, index = _new_index(path, ram_pages, numbers, digests)
        jobs.append(writer.submit(_finish, fd, raw, index))
        yield index
        for job in jobs:
            job.result()


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
    with new_file(path) as fd:
        raw, index = _new_index(path, ram_pages, numbers, digests)
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
                write_at(fd, data, DATA_OFFSET + int(places[start]) * PAGE_SIZE)
        if missing.any():
            raise ValueError(f"{path}: no content for page {stored[missing][0]}")
        _finish(fd, raw, index)
    return index


def _new_index(
    path: Path, ram_pages: int, numbers: NDArray[np.uint64], digests: NDArray[np.uint8]
) -> tuple[bytes, PageIndex]:
    """The index for these entries, as it is in the file too. Corrupt: it could not be read back."""
    stored = int(np.count_nonzero(are_stored(digests)))
    raw = encode_index(ram_pages, numbers, digests, stored)
    return raw, decode_index(raw, len(raw) + stored * PAGE_SIZE, str(path))


def _write_data(fd: int, runs: Sequence[memoryview], at: int) -> None:
    write_all_at(fd, runs, at)
    start_flushing(fd, at, sum(map(len, runs)))


def _finish(fd: int, raw: bytes, index: PageIndex) -> None:
    """Write the index around the data, and flush all."""
    view = memoryview(raw)
    write_at(fd, view[:DATA_OFFSET], 0)
    write_at(fd, view[DATA_OFFSET:], DATA_OFFSET + index.stored * PAGE_SIZE)
    seal(fd)
