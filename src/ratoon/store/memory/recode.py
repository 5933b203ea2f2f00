"""A page set from its plain form into the compressed one, and back; the content stays the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ratoon.files import removed_on_error
from ratoon.store.memory.compressed import FRAME, write_frames
from ratoon.store.memory.digests import are_stored
from ratoon.store.memory.pageset import PageIndex, index_bytes, read_index, read_pages
from ratoon.store.memory.writing import write_page_stream


def compress_page_set(source: Path, path: Path, index_digest: str, level: int, label: str) -> None:
    """Write `source`, of either form, to the new file `path` compressed, and read that back.

    `level` is zstd's. Flushed, mode 0444. Corrupt: a page of `source`, called `label`, is not what
    its digest says, or what was written is not what can be read. A failure leaves no file.
    """
    index = read_index(source, label=label, expected_digest=index_digest)
    frames = _frames(source, index, label)
    write_frames(path, b"".join(index_bytes(index)), index.stored, frames, level)
    _read_back(path, index_digest)


def expand_page_set(source: Path, path: Path, index_digest: str, label: str) -> None:
    """As `compress_page_set`, to the plain form."""
    index = read_index(source, label=label, expected_digest=index_digest)
    entries = np.flatnonzero(are_stored(index.digests))
    content = read_pages(source, index, entries, label=label)
    write_page_stream(path, index.ram_pages, index.numbers, index.digests, content)
    _read_back(path, index_digest)


def _frames(source: Path, index: PageIndex, label: str) -> Iterator[memoryview]:
    entries = np.flatnonzero(are_stored(index.digests))
    for _, pages in read_pages(source, index, entries, label=label):
        for first in range(0, len(pages), FRAME):  # they come in whole frames, but for the last
            yield pages[first : first + FRAME].reshape(-1).data


def read_whole(path: Path, index_digest: str, label: str) -> None:
    """Read all of a page set of either form against its digests. Corrupt."""
    index = read_index(path, label=label, expected_digest=index_digest)
    for _ in read_pages(path, index, None, label=label):
        pass


def _read_back(path: Path, index_digest: str) -> None:
    with removed_on_error(path):
        read_whole(path, index_digest, f"the rewritten layer {path}")
