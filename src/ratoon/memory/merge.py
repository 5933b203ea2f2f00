"""Merging: a chain of memory layers into one layer with the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon.artifacts import Progress, silent
from ratoon.errors import Corrupt
from ratoon.memory.chain import Link, overlay, pages_above, resolve
from ratoon.memory.digests import PAGE_SIZE, are_stored, memory_root, zero_array
from ratoon.memory.pageset import PageIndex, read_index, read_pages, write_page_stream

_MIB = 1024 * 1024
_REPORT = 64 * _MIB // PAGE_SIZE  # pages


def write_merged(
    path: Path, links: Sequence[Link], ram_pages: int, progress: Progress = silent
) -> PageIndex:
    """Write the memory of the head of `links` as one page set, a base, and read it back.

    Holds a few MiB of pages at a time. Flushed, mode 0444; a failure leaves no file. Raises
    FileExistsError, ChainMismatch, and Corrupt naming the layer and page that do not match their
    digest, or `path` if what was written is not what can be read.
    """
    array = resolve(links, ram_pages)
    numbers = np.flatnonzero(are_stored(array)).astype(np.uint64)
    digests = array[numbers.astype(np.int64)]
    content = _reported(pages_above(links, 0), len(numbers), "merging memory", progress)
    write_page_stream(path, ram_pages, numbers, digests, content)
    try:
        return _read_back(path, links[-1].root, progress)
    except BaseException:
        path.unlink()
        raise


def _read_back(path: Path, root: str, progress: Progress) -> PageIndex:
    label = f"the merged layer {path}"
    index = read_index(path, label=label)
    if memory_root(overlay(zero_array(index.ram_pages), index)) != root:
        raise Corrupt(f"{label} does not give memory root {root}; try again, and check this host")
    pages = read_pages(path, index, None, label=label)
    for _ in _reported(pages, len(index.numbers), "checking what was written", progress):
        pass
    return index


def _reported(
    pages: Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]],
    total: int,
    what: str,
    progress: Progress,
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    done = reported = 0
    for numbers, content in pages:
        yield numbers, content
        done += len(numbers)
        if done - reported >= _REPORT or done == total:
            reported = done
            to_mib = PAGE_SIZE / _MIB
            progress(f"{what}: {done * to_mib:.0f} of {total * to_mib:.0f} MiB")
