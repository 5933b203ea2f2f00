"""What an image adds to the disk, on file systems that can share extents and one that cannot.

A part of the bench `disk`: writes a chain of layers, and makes the head's image, by copying,
and by sharing extents where that works.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ratoon.bench.loop_mounts import mounted, used_bytes
from ratoon.bench.samples import MIB, milliseconds
from ratoon.bench.tables import Table, spread
from ratoon.memory.chain import Link, overlay
from ratoon.memory.digests import PAGE_SIZE, hash_pages, memory_root, zero_array
from ratoon.memory.image import ImageStore
from ratoon.memory.runs import run_bounds
from ratoon.memory.writing import write_page_set

DISK_BYTES = 2 << 30
RAM_PAGES = 512 * MIB // PAGE_SIZE


@dataclass(frozen=True)
class LayerShape:
    """How the pages of a layer lie: runs whose lengths are log-normal."""

    pages: int
    #: Pages in the median run.
    median_run: float
    #: Standard deviation of the logarithm of a run's length.
    spread: float


#: As measured on the demo's base of 512 MiB and the first snapshots on it: 27,000 pages in 315
#: runs, then 3,600 in 410 and 1,000 in 350. Then the worst case: no page beside another.
CHAINS = {
    "guest": (
        LayerShape(27_000, 4, 2.4),
        LayerShape(3_600, 1.5, 1.9),
        LayerShape(1_000, 1, 1.5),
    ),
    "single pages": (LayerShape(24_000, 1, 0),),
}


@dataclass(frozen=True)
class Made:
    """One image, made one way on one file system.

    `image_bytes`: holes left out. `added_bytes`: what the file system has less of after the first
    one, its own records included; 0 for the others.
    """

    filesystem: str
    chain: str
    how: str
    round: int
    image_bytes: int
    runs: int
    added_bytes: int
    ms: float


def measure(kind: str, rounds: int) -> list[Made]:
    """The images of one kind of file system; blocks. HostError: it cannot be mounted here."""
    rows: list[Made] = []
    for chain, shapes in CHAINS.items():
        for how in ("copy", "reflink"):
            with mounted(kind, DISK_BYTES) as root:
                links = write_chain(root, shapes)
                store = ImageStore(root / "images", budget=DISK_BYTES)
                if how == "reflink" and not store.reflinks:
                    continue
                store.reflinks = how == "reflink"
                rows += _measure(store, links, rounds, kind, chain, how)
    return rows


def write_chain(root: Path, shapes: tuple[LayerShape, ...]) -> list[Link]:
    """Layers of random pages in `root`, one of each shape; the same ones every time."""
    rng = np.random.default_rng(1)
    array = zero_array(RAM_PAGES)
    links = []
    for number, shape in enumerate(shapes):
        numbers = _page_numbers(rng, shape)
        pages = rng.integers(1, 256, (len(numbers), PAGE_SIZE), np.uint8)
        path = root / f"layer{number}"
        rows = np.arange(len(numbers))
        index = write_page_set(path, RAM_PAGES, numbers, hash_pages(pages), pages, rows)
        array = overlay(array, index)
        links.append(Link(f"L{number}", path, index, memory_root(array)))
    return links


def _page_numbers(rng: np.random.Generator, shape: LayerShape) -> NDArray[np.uint64]:
    """Strictly increasing page numbers: `shape.pages` of them in runs, with gaps between."""
    lengths: list[int] = []
    while (left := shape.pages - sum(lengths)) > 0:
        length = round(float(np.exp(rng.normal(np.log(shape.median_run), shape.spread))))
        lengths.append(min(max(length, 1), left, shape.pages // 10))
    # One free page after each run, and the others put between them at random.
    cuts = np.sort(rng.integers(0, RAM_PAGES - shape.pages - len(lengths), len(lengths)))
    starts = cuts + np.array([0, *accumulate(length + 1 for length in lengths)][:-1])
    runs = [np.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
    return np.concatenate(runs).astype(np.uint64)


def _measure(
    store: ImageStore, links: list[Link], rounds: int, kind: str, chain: str, how: str
) -> list[Made]:
    rows: list[Made] = []
    before = used_bytes(store.directory)
    for number in range(rounds):
        store.remove(links[-1].root)  # xfs frees it at leisure: it would disturb what is added
        start = time.perf_counter()
        image = store.make(links, RAM_PAGES)
        ms = milliseconds(time.perf_counter() - start)
        added = used_bytes(store.directory) - before if number == 0 else 0
        runs, data = _data_of(image)
        rows.append(Made(kind, chain, how, number, data, runs, added, ms))
    return rows


def _data_of(image: Path) -> tuple[int, int]:
    """Runs of pages that are not all zero, and the bytes in them."""
    ram = np.fromfile(image, np.uint64).reshape(RAM_PAGES, -1)
    numbers = np.flatnonzero(ram.any(axis=1))
    return len(run_bounds(numbers)) - 1, len(numbers) * PAGE_SIZE


def table(rows: Sequence[Made]) -> Table:
    """Medians of the times; what is added is that of the first image."""
    cells = []
    for key in dict.fromkeys((row.filesystem, row.chain, row.how) for row in rows):
        found = [row for row in rows if (row.filesystem, row.chain, row.how) == key]
        first = found[0]
        times = [row.ms for row in found]
        copies = (*key[:2], "copy")
        copied = median(row.ms for row in rows if (row.filesystem, row.chain, row.how) == copies)
        cells.append(
            (
                *key,
                f"{first.image_bytes / MIB:.1f}",
                f"{first.runs:,}",
                f"{first.added_bytes / MIB:.2f}",
                f"{100 * first.added_bytes / first.image_bytes:.2f}",
                spread(times, 0),
                f"{median(times) / copied:.2f}",
            )
        )
    columns = (
        *("file system", "chain", "how", "image MiB", "runs"),
        *("added MiB", "added %", "ms", "÷ copy"),
    )
    return Table("Images made from layers", columns, tuple(cells), ("disk-images",), 3)
