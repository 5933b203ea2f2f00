"""What an image adds to the disk, on file systems that can share extents and one that cannot.

::

    python -m ratoon.bench.filesystems [--csv FILE]

Makes ext4, xfs and btrfs in sparse files, mounts them (as root), writes a chain of layers on each,
and makes the head's image from it: by copying, and by sharing extents where that works.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ratoon.bench.loop_mounts import KINDS, mounted, used_bytes
from ratoon.errors import RatoonError
from ratoon.memory.chain import Link, overlay
from ratoon.memory.digests import PAGE_SIZE, hash_pages, memory_root, zero_array
from ratoon.memory.image import ImageStore
from ratoon.memory.pageset import write_page_set
from ratoon.memory.runs import run_bounds

MIB = 1 << 20
DISK_BYTES = 2 << 30
RAM_PAGES = 512 * MIB // PAGE_SIZE
ROUNDS = 3


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
class Row:
    """One way of making one image on one file system."""

    filesystem: str
    chain: str
    how: str
    #: Of the image, holes left out.
    image_bytes: int
    runs: int
    #: What the file system has less of after the first one, its records included.
    added_bytes: int
    #: The median.
    seconds: float

    @property
    def added_percent(self) -> float:
        return 100 * self.added_bytes / self.image_bytes


def measure(kind: str, rounds: int = ROUNDS) -> list[Row]:
    """The rows of one kind of file system. HostError: it cannot be mounted here."""
    rows = []
    for chain, shapes in CHAINS.items():
        for how in ("copy", "reflink"):
            with mounted(kind, DISK_BYTES) as root:
                links = write_chain(root, shapes)
                store = ImageStore(root / "images", budget=DISK_BYTES)
                if how == "reflink" and not store.reflinks:
                    continue
                store.reflinks = how == "reflink"
                rows.append(_measure(store, links, rounds, kind, chain, how))
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
) -> Row:
    seconds = []
    before = used_bytes(store.directory)
    added = None
    for _ in range(rounds):
        store.remove(links[-1].root)  # xfs frees it at leisure: it would disturb what is added
        start = time.perf_counter()
        image = store.make(links, RAM_PAGES)
        seconds.append(time.perf_counter() - start)
        if added is None:
            added = used_bytes(store.directory) - before
    assert added is not None
    runs, data = _data_of(image)
    return Row(kind, chain, how, data, runs, added, median(seconds))


def _data_of(image: Path) -> tuple[int, int]:
    """Runs of pages that are not all zero, and the bytes in them."""
    ram = np.fromfile(image, np.uint64).reshape(RAM_PAGES, -1)
    numbers = np.flatnonzero(ram.any(axis=1))
    return len(run_bounds(numbers)) - 1, len(numbers) * PAGE_SIZE


def show(console: Console, rows: list[Row]) -> None:
    """Print the table."""
    table = Table(box=None, pad_edge=False)
    names = ("file system", "chain", "how", "image MiB", "runs", "added MiB", "added %", "ms")
    for name in (*names, "time/copy"):
        table.add_column(name, justify="right" if name not in names[:3] else "left")
    copies = {(row.filesystem, row.chain): row.seconds for row in rows if row.how == "copy"}
    for row in rows:
        table.add_row(
            *(row.filesystem, row.chain, row.how),
            f"{row.image_bytes / MIB:.1f}",
            f"{row.runs}",
            f"{row.added_bytes / MIB:.2f}",
            f"{row.added_percent:.2f}",
            f"{row.seconds * 1000:.0f}",
            f"{row.seconds / copies[row.filesystem, row.chain]:.2f}",
        )
    console.print(table, highlight=False)


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a row; the columns are the fields of `Row`."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main() -> int:
    """Measure all kinds of file systems; the exit code is 1 if one could not be mounted."""
    parser = argparse.ArgumentParser(prog="python -m ratoon.bench.filesystems")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="images made each way")
    parser.add_argument("--csv", type=Path, help="also write the rows as CSV to this file")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows: list[Row] = []
    failed = False
    for kind in KINDS:
        try:
            rows += measure(kind, options.rounds)
        except RatoonError as error:
            failed = True
            console.print(f"{kind}: {error}", style="red", highlight=False, markup=False)
    show(console, rows)
    if options.csv:
        write_csv(options.csv, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
