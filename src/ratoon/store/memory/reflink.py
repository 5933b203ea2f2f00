"""Reflink: an image shares the extents of the layers that it is made from, instead of copying them.

xfs and btrfs can; ext4 cannot. A page set's data is page-aligned in its file, so a run of pages is
shared by one call, whatever their number.
"""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon.files import clone_range
from ratoon.store.memory.chain import Link
from ratoon.store.memory.compressed import opened_frames
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import read_checked
from ratoon.store.memory.ranges import run_bounds


def can_reflink(directory: Path) -> bool:
    """Whether files in `directory` can share extents a page at a time, found out by doing it."""
    with (
        tempfile.TemporaryFile(dir=directory) as source,
        tempfile.TemporaryFile(dir=directory) as target,
    ):
        source.write(b"\1" * 2 * PAGE_SIZE)
        source.flush()
        os.ftruncate(target.fileno(), 2 * PAGE_SIZE)
        return clone_range(source.fileno(), PAGE_SIZE, PAGE_SIZE, target.fileno(), 0)


def share_pages(image: int, link: Link, entries: NDArray[np.int64]) -> NDArray[np.int64]:
    """Have the image share the pages of a layer; returns the entries that could not be shared.

    `image` is a descriptor open for reading and writing, `entries`, shape (m,), increasing, are
    positions in the layer's index that have data. What is shared is read back from the image, so
    from what its forks will map, and checked: Corrupt names the layer and the page. A compressed
    layer has nothing to share.
    """
    numbers = link.index.numbers[entries]
    positions = link.index.data_positions[entries]
    targets = numbers.astype(np.int64) * PAGE_SIZE
    # Runs that are consecutive in the layer and in the image.
    bounds = np.union1d(run_bounds(positions // PAGE_SIZE), run_bounds(numbers))
    try:
        layer = os.open(link.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:  # whoever reads the entries instead will say so
        return entries
    try:
        if opened_frames(layer, link.label):
            return entries
        shared = 0
        for start, end in pairwise(bounds.tolist()):
            length = (end - start) * PAGE_SIZE
            if not clone_range(layer, int(positions[start]), length, image, int(targets[start])):
                break
            shared = end
    finally:
        os.close(layer)
    for _ in read_checked(image, link.index, entries[:shared], targets[:shared], label=link.label):
        pass
    return entries[shared:]
