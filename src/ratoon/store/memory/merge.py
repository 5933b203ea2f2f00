"""Merging: the upper part of a chain of memory layers, or all of it, into one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon.artifacts import Progress, silent
from ratoon.errors import Corrupt
from ratoon.files import removed_on_error
from ratoon.store.memory.chain import Link, overlay, pages_above, resolve
from ratoon.store.memory.digests import are_stored, digests_differ, memory_root
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import PageIndex, read_index, read_pages
from ratoon.store.memory.writing import write_page_stream
from ratoon.units import MIB

_REPORT = 64 * MIB // PAGE_SIZE  # pages


def write_merged(
    path: Path,
    links: Sequence[Link],
    ram_pages: int,
    progress: Progress = silent,
    *,
    kept: int = 0,
) -> PageIndex:
    """Write what the links above the first `kept` give as one page set, and read it back.

    Above none that is all the memory of their head, a base. Holds a few MiB of pages at a time.
    Flushed, mode 0444; a failure leaves no file. Raises FileExistsError, ChainMismatch, and Corrupt
    naming the layer and page that do not match their digest, or `path` if what was written is not
    what can be read.
    """
    array, below = resolve(links, ram_pages), resolve(links[:kept], ram_pages)
    numbers = np.flatnonzero(digests_differ(array, below)).astype(np.uint64)
    digests = array[numbers.astype(np.int64)]
    stored = numbers[are_stored(digests)]
    content = _among(stored, pages_above(links, kept))
    content = _reported(content, len(stored), "merging memory", progress)
    write_page_stream(path, ram_pages, numbers, digests, content)
    with removed_on_error(path):
        return _read_back(path, below, links[-1].root, progress)


def _among(
    wanted: NDArray[np.uint64], pages: Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """Of the pages those that are wanted: not what is all zeros, nor what lies below anyway."""
    for numbers, content in pages:
        chosen = np.isin(numbers, wanted, assume_unique=True)
        yield numbers[chosen], content[chosen]


def _read_back(path: Path, below: NDArray[np.uint8], root: str, progress: Progress) -> PageIndex:
    label = f"the merged layer {path}"
    index = read_index(path, label=label)
    if memory_root(overlay(below, index)) != root:
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
            to_mib = PAGE_SIZE / MIB
            progress(f"{what}: {done * to_mib:.0f} of {total * to_mib:.0f} MiB")
