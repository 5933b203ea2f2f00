"""Chains of memory layers, base first: do they fit together, and which layer has which page.

Answered from the indexes alone. Page data is read, and checked, only to be put to use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon.errors import ChainMismatch, Corrupt
from ratoon.store.memory.digests import are_stored, memory_root, zero_array
from ratoon.store.memory.pageset import PageIndex, read_pages


@dataclass(frozen=True, eq=False)
class Link:
    """One layer of a chain."""

    #: The snapshot whose layer it is.
    tag: str
    path: Path
    index: PageIndex
    #: Memory root that this layer on top of those below it must give, in hex.
    root: str

    @property
    def label(self) -> str:
        """What errors call this layer."""
        return f"snapshot {self.tag}, memory layer"


def overlay(parent: NDArray[np.uint8], index: PageIndex) -> NDArray[np.uint8]:
    """A new digest array: `parent`, shape (ram_pages, 32), with the entries of `index` over it."""
    array = parent.copy()
    _put(array, index)
    return array


def resolve(links: Sequence[Link], ram_pages: int) -> NDArray[np.uint8]:
    """The digest array of a chain's head, a new array of shape (ram_pages, 32).

    Proves that the chain fits together by the head's memory root. Raises ChainMismatch naming the
    first link that gives another root than it must, and Corrupt for a layer of another RAM size.
    """
    array = zero_array(ram_pages).copy()
    for link in links:
        if link.index.ram_pages != ram_pages:
            raise Corrupt(
                f"{link.label} is for {link.index.ram_pages} pages of RAM, "
                f"its chain has {ram_pages}"
            )
        _put(array, link.index)
    if links and memory_root(array) != links[-1].root:
        raise _first_mismatch(links, ram_pages)
    return array


def owners(
    links: Sequence[Link],
) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int64]]:
    """Which layer has which page: the newest of those that hold it.

    Returns, for each page that is in any layer: its number (uint64, sorted), the position of its
    link in `links` (int32) and of its entry in that link's index (int64), each of shape (k,).
    """
    sizes = [len(link.index.numbers) for link in links]
    if not sum(sizes):
        return np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int64)
    numbers = np.concatenate([link.index.numbers for link in links])
    position = np.repeat(np.arange(len(links), dtype=np.int32), sizes)
    entry = np.concatenate([np.arange(size) for size in sizes])
    # Stable, so of equal numbers the newest is last; and timsort merges runs that are sorted.
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    newest = order[np.append(ordered[1:] != ordered[:-1], True)]
    return numbers[newest], position[newest], entry[newest]


def count_above(links: Sequence[Link], covered: int) -> int:
    """How many pages `pages_above` yields for the same arguments; reads no file."""
    return sum(len(entries) for _, entries in entries_above(links, covered))


def pages_above(
    links: Sequence[Link], covered: int
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """What turns the memory of the first `covered` links into the head's, each page once.

    Yields page numbers (k,) and pages (k, 4096), checked as by `read_pages`, which may raise
    Corrupt. Above nothing (`covered` 0) pages of zeros are left out: zero is what lies below.
    """
    for link, entries in entries_above(links, covered):
        yield from read_pages(link.path, link.index, entries, label=link.label)


def entries_above(links: Sequence[Link], covered: int) -> Iterator[tuple[Link, NDArray[np.int64]]]:
    """For each link above the first `covered`, which entries of its index `pages_above` reads.

    int64, shape (k,), increasing.
    """
    above = links[covered:]
    _, position, entry = owners(above)
    for i, link in enumerate(above):
        entries = entry[position == i]
        if covered == 0:
            entries = entries[are_stored(link.index.digests[entries])]
        yield link, entries


def _put(array: NDArray[np.uint8], index: PageIndex) -> None:
    # As whole 32-byte items; numpy copies rows of bytes at a third of the speed.
    np.put(array.view("V32"), index.numbers.view(np.int64), index.digests.view("V32"))


def _first_mismatch(links: Sequence[Link], ram_pages: int) -> ChainMismatch:
    array = zero_array(ram_pages).copy()
    for link in links:
        _put(array, link.index)
        found = memory_root(array)
        if found != link.root:
            return ChainMismatch(link.tag, link.root, found)
    raise AssertionError("the head's root matches after all")
