"""The memory of a snapshot, looked at as a whole: every page, and whether the chain fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ratoon.errors import ChainMismatch, Corrupt
from ratoon.store.memory.compressed import plain_size
from ratoon.store.memory.digests import are_stored, zero_array
from ratoon.store.memory.page import DIGEST_SIZE
from ratoon.store.memory.pageset import (
    PageIndex,
    index_bytes,
    read_index,
    read_pages,
)
from ratoon.store.snapshot.links import ram_pages
from ratoon.store.snapshot.progress import Meter
from ratoon.store.snapshot.snapshot import Snapshot

#: Pages whose digests are looked at together.
_PIECE = 1 << 16


def verify_memory(snapshot: Snapshot, labels: Sequence[str], meter: Meter) -> list[str]:
    """Check all pages, and that each layer gives the memory root that it must.

    Returns the BLAKE3 (hex) of each layer's plain form, base first, from the same reading. What
    it holds in memory depends on the pages that the layers have, not on the RAM that the manifest
    claims. Corrupt names the layer by `labels` and the page; ChainMismatch the first layer that
    does not fit.
    """
    pages = ram_pages(snapshot)
    numbers, array = np.zeros(0, np.uint64), np.zeros((0, DIGEST_SIZE), np.uint8)
    digests = []
    for number, (layer, label) in enumerate(zip(snapshot.manifest.layers, labels, strict=True)):
        path = snapshot.memory_path(number)
        # First: it bounds what a compressed one can make of itself.
        if plain_size(path, label=label) != layer.memory.size:
            raise Corrupt(f"{label}: its size is not what the manifest says")
        index = read_index(path, label=label, expected_digest=layer.memory.index_digest)
        found = (index.ram_pages, len(index.numbers), index.stored)
        if found != (pages, layer.memory.entries, layer.memory.stored):
            raise Corrupt(f"{label}: its counts are not those that the manifest says")
        numbers, array = _merged(numbers, array, index)
        if (root := _root(numbers, array, pages)) != layer.memory_root:
            raise ChainMismatch(layer.tag, layer.memory_root, root)
        digests.append(_plain_digest(path, index, label, meter))
    return digests


def _merged(
    numbers: NDArray[np.uint64], digests: NDArray[np.uint8], index: PageIndex
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """The pages `numbers` (n,) with their `digests` (n, 32), and those of `index` over them."""
    both = np.concatenate((numbers, index.numbers))
    order = np.argsort(both, kind="stable")  # so of equal numbers the newer comes last
    ordered = both[order]
    newest = np.ones(len(both), np.bool_)
    newest[:-1] = ordered[1:] != ordered[:-1]
    return ordered[newest], np.concatenate((digests, index.digests))[order[newest]]


def _root(numbers: NDArray[np.uint64], digests: NDArray[np.uint8], ram_pages: int) -> str:
    """The memory root of RAM that is zero but for the pages `numbers`, a piece at a time."""
    hasher = blake3(max_threads=blake3.AUTO)
    for start in range(0, ram_pages, _PIECE):
        piece = zero_array(min(_PIECE, ram_pages - start)).copy()
        first, last = np.searchsorted(numbers, np.array([start, start + len(piece)], np.uint64))
        piece[numbers[first:last] - np.uint64(start)] = digests[first:last]
        hasher.update(piece.data)
    return hasher.hexdigest()


def _plain_digest(path: Path, index: PageIndex, label: str, meter: Meter) -> str:
    """The digest of a whole page set, of pages that were checked as they were hashed."""
    before, after = index_bytes(index)
    hasher = blake3(before)
    meter.add(len(before))
    for _, pages in read_pages(path, index, np.flatnonzero(are_stored(index.digests)), label=label):
        hasher.update(pages.reshape(-1).data)
        meter.add(pages.nbytes)
    hasher.update(after)
    meter.add(len(after))
    return hasher.hexdigest()
