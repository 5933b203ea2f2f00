"""What a base and ten links take on ext4, xfs and btrfs, and what images and compression change.

Each file system is made in a sparse file and mounted by a loop device. In a sandbox of the base,
eight MiB are dirtied before each link. Then a fork of each link is written as a full snapshot: what
it would be without diffs.

Images: a chain of layers is written as guests have them, and the head's image made, by copying, and
by sharing extents where that works. Compression at rest: the guest of each link has read files of
its own disk, so its memory is full of what real guests have there. Processor time is this
process's, all threads of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from ratoon.bench.bench import Bench, Workshop, build_diff
from ratoon.bench.dirtying import dirty
from ratoon.bench.loop_mounts import KINDS, mounted, used_bytes
from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import Samples, milliseconds
from ratoon.bench.tables import Table, Target, spread
from ratoon.engine.sandbox.engine import RAM_BYTES, Engine
from ratoon.store.memory.chain import Link, overlay
from ratoon.store.memory.digests import hash_pages, memory_root, zero_array
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.ranges import run_bounds
from ratoon.store.memory.writing import write_page_set
from ratoon.store.snapshot.compress import Form, rewrite_layers
from ratoon.store.snapshot.links import ram_pages, read_links
from ratoon.units import MIB

DISK_BYTES = 8 << 30
LINKS = 10
DIRTIED_MIB = 8
#: The file system on which layers are compressed as well.
AT_REST = "ext4"

IMAGES_DISK_BYTES = 2 << 30
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

#: Which files the guest of each link has read, by their first letter.
READ = ("[a-g]", "[h-o]", "[p-z]")


@dataclass(frozen=True)
class Taken:
    """What the store takes on one file system with one snapshot more; bytes.

    `used` is what the file system has less of, its own records included, after that snapshot;
    `logical` and `physical` are those of the files that the snapshot alone has, `memory` and `disk`
    the physical ones of its two layers.
    """

    filesystem: str
    kind: str
    number: int
    logical_bytes: int
    physical_bytes: int
    memory_bytes: int
    disk_bytes: int
    used_bytes: int


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


@dataclass(frozen=True)
class Step:
    """One step with all layers of the chain. `layers_bytes`: what they take on the disk then."""

    round: int
    step: str
    layers_bytes: int
    wall_ms: float
    cpu_ms: float


async def measure(shop: Workshop) -> Samples:
    taken: list[Taken] = []
    made: list[Made] = []
    steps: list[Step] = []
    for kind in KINDS:
        shop.say(f"{kind}: a base and {LINKS} links")
        with mounted(kind, DISK_BYTES) as root:
            async with Engine.open(root / "home") as engine:
                taken += await _chain(engine, root, kind)
                if kind == AT_REST:
                    shop.say(f"{kind}: compression at rest")
                    steps = await _measure_at_rest(engine, "base", shop.iterations)
        shop.say(f"{kind}: images")
        made += await asyncio.to_thread(_measure_images, kind, shop.iterations)
    return {"disk": taken, "disk-images": made, "disk-at-rest": steps}


async def _chain(engine: Engine, root: Path, kind: str) -> list[Taken]:
    empty = await asyncio.to_thread(used_bytes, root)
    await engine.bases.from_image("debian", "base")
    # A base comes with its image, a cache: what it takes is told apart.
    engine.evict_image("base")
    rows = [await _taken(engine, root, kind, "base", "base", 0, empty)]
    async with await engine.fork_one("base") as sandbox:
        for number in range(1, LINKS + 1):
            await dirty(sandbox, DIRTIED_MIB, f"written{number}")
            before = await _used(engine, root)
            await engine.branch(sandbox, f"link{number}")
            rows.append(await _taken(engine, root, kind, "link", f"link{number}", number, before))
    for number in range(1, LINKS + 1):
        async with await engine.fork_one(f"link{number}") as sandbox:
            before = await _used(engine, root)
            await engine.branch(sandbox, f"full{number}", "full")
            rows.append(await _taken(engine, root, kind, "full", f"full{number}", number, before))
    return rows


async def _used(engine: Engine, root: Path) -> int:
    await engine.settle()
    return await asyncio.to_thread(used_bytes, root)


async def _taken(
    engine: Engine, root: Path, kind: str, what: str, tag: str, number: int, before: int
) -> Taken:
    used = await _used(engine, root) - before
    snapshot = engine.store.get(tag)
    own = [path.stat() for path in snapshot.path.iterdir() if path.is_file()]
    return Taken(
        filesystem=kind,
        kind=what,
        number=number,
        logical_bytes=sum(status.st_size for status in own),
        physical_bytes=sum(status.st_blocks * 512 for status in own),
        memory_bytes=snapshot.memory_path(snapshot.depth).stat().st_blocks * 512,
        disk_bytes=snapshot.disk_path(snapshot.depth).stat().st_blocks * 512,
        used_bytes=used,
    )


def _measure_images(kind: str, rounds: int) -> list[Made]:
    """The images of one kind of file system; blocks. HostError: it cannot be mounted here."""
    rows: list[Made] = []
    for chain, shapes in CHAINS.items():
        for how in ("copy", "reflink"):
            with mounted(kind, IMAGES_DISK_BYTES) as root:
                links = write_chain(root, shapes)
                store = ImageStore(root / "images", budget=IMAGES_DISK_BYTES)
                if how == "reflink" and not store.reflinks:
                    continue
                store.reflinks = how == "reflink"
                rows += _make_images(store, links, rounds, kind, chain, how)
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


def _make_images(
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


async def _measure_at_rest(engine: Engine, base: str, rounds: int) -> list[Step]:
    """Links on `base`, compressed and made plain again, and the head's image made of both."""
    for number, letters in enumerate(READ):
        parent = f"read{number - 1}" if number else base
        script = f"find /usr -xdev -type f -name '{letters}*' -exec cat {{}} + >/dev/null"
        await build_diff(engine, parent, f"read{number}", ["sh", "-c", script])
    await engine.settle()
    return await asyncio.to_thread(_rewrite_layers, engine, f"read{len(READ) - 1}", rounds)


def _rewrite_layers(engine: Engine, head: str, rounds: int) -> list[Step]:
    snapshot = engine.store.get(head)
    rows: list[Step] = []

    def do(number: int, step: str, what: Callable[[], object]) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        what()
        took, used = time.perf_counter() - began, time.process_time() - cpu
        paths = [snapshot.memory_path(layer) for layer in range(snapshot.depth + 1)]
        taken = sum(path.stat().st_blocks * 512 for path in paths)
        rows.append(Step(number, step, taken, milliseconds(took), milliseconds(used)))

    def make_image() -> None:
        engine.images.make(read_links(snapshot), ram_pages(snapshot))

    def rewrite(form: Form) -> None:
        rewrite_layers(engine.store, form, [head])

    for number in range(rounds):
        engine.images.remove(snapshot.manifest.memory_root)
        do(number, "image of plain layers", make_image)
        do(number, "compress", lambda: rewrite("compressed"))
        engine.images.remove(snapshot.manifest.memory_root)
        do(number, "image of compressed layers", make_image)
        do(number, "make plain again", lambda: rewrite("plain"))
    return rows


def _of(rows: Sequence[Taken], filesystem: str, kind: str) -> list[Taken]:
    return [row for row in rows if (row.filesystem, row.kind) == (filesystem, kind)]


def tables(samples: Samples) -> Sequence[Table]:
    rows = samples["disk"]
    cells = []
    for filesystem in dict.fromkeys(row.filesystem for row in rows):
        (base,) = _of(rows, filesystem, "base")
        links, full = _of(rows, filesystem, "link"), _of(rows, filesystem, "full")
        all_links = base.used_bytes + sum(row.used_bytes for row in links)
        all_full = base.used_bytes + sum(row.used_bytes for row in full)
        copies = (len(links) + 1) * RAM_BYTES
        cells.append(
            (
                filesystem,
                f"{base.used_bytes / MIB:.1f}",
                spread((row.physical_bytes / MIB for row in links), 2),
                f"{median(row.memory_bytes for row in links) / MIB:.2f}",
                f"{median(row.disk_bytes for row in links) / MIB:.2f}",
                spread((row.used_bytes / MIB for row in links), 2),
                f"{all_links / MIB:.0f}",
                spread(row.used_bytes / MIB for row in full),
                f"{all_full / MIB:.0f}",
                f"{copies / MIB:,.0f}",
                f"{copies / all_links:.1f}",
            )
        )
    columns = (
        *("file system", "base MiB", "a link's files", "its memory", "its disk"),
        "a link, of the file system",
        *(f"base + {LINKS} links", "a full snapshot", f"base + {LINKS} full"),
        *(f"{LINKS + 1} copies of the RAM", "copies ÷ links"),
    )
    title = f"Snapshots, MiB; {DIRTIED_MIB} MiB dirtied before each; median (least…most)"
    return [
        Table(title, columns, tuple(cells), ("disk",)),
        _images_table(samples["disk-images"]),
        _at_rest_table(samples["disk-at-rest"]),
    ]


def _images_table(rows: Sequence[Made]) -> Table:
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


def _at_rest_table(rows: Sequence[Step]) -> Table:
    cells = []
    for step in dict.fromkeys(row.step for row in rows):
        found = [row for row in rows if row.step == step]
        cells.append(
            (
                step,
                f"{median(row.layers_bytes for row in found) / MIB:.0f}",
                spread((row.wall_ms for row in found), 0),
                spread((row.cpu_ms for row in found), 0),
            )
        )
    title = f"Compression at rest: a base and {len(READ)} links on it, 512 MiB of RAM"
    columns = ("step", "memory layers MiB", "ms", "processor ms")
    return Table(title, columns, tuple(cells), ("disk-at-rest",))


def targets(samples: Samples) -> Sequence[Target]:
    rows = samples["disk"]
    found = []
    for filesystem in dict.fromkeys(row.filesystem for row in rows):
        links = _of(rows, filesystem, "link")
        for what, field in (("memory layer", "memory_bytes"), ("all it takes", "used_bytes")):
            mib = median(getattr(row, field) for row in links) / MIB
            name = f"link of {DIRTIED_MIB} MiB on {filesystem}, {what}, MiB"
            found.append(Target(name, mib, "≤", 9.5, "disk"))
    return found


def plots(samples: Samples) -> Sequence[Plot]:
    rows = samples["disk"]
    series = []
    for kind, name in (("link", "a diff"), ("full", "a full snapshot")):
        points = (
            (fs, tuple(row.used_bytes / MIB for row in _of(rows, fs, kind)))
            for fs in dict.fromkeys(row.filesystem for row in rows)
        )
        series.append(Series(name, tuple(points)))
    title = f"What one more snapshot takes, {DIRTIED_MIB} MiB having been dirtied"
    return [Plot("disk", title, "file system", "MiB (log)", tuple(series), True, False)]


def wrong(samples: Samples) -> str | None:
    thin = [
        asdict(row)
        for row in samples["disk"]
        if row.kind == "link" and row.logical_bytes < DIRTIED_MIB * MIB
    ]
    return f"a link holds less than what was dirtied: {thin[0]}" if thin else None


BENCH = Bench(
    name="disk",
    title="On the disk",
    iterations=3,
    rows={"disk": Taken, "disk-images": Made, "disk-at-rest": Step},
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
    wrong=wrong,
)
