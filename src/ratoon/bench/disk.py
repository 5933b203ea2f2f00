"""What a base and ten links take on ext4, xfs and btrfs, and what an image adds to that.

Each file system is made in a sparse file and mounted by a loop device. In a sandbox of the base,
eight MiB are dirtied before each link. Then a fork of each link is written as a full snapshot: what
it would be without diffs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from ratoon.bench import at_rest, images
from ratoon.bench.bench import Bench, Workshop
from ratoon.bench.dirtying import dirty
from ratoon.bench.loop_mounts import KINDS, mounted, used_bytes
from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import MIB, Samples
from ratoon.bench.tables import Table, Target, spread
from ratoon.sandbox.engine import RAM_BYTES, Engine

DISK_BYTES = 8 << 30
LINKS = 10
DIRTIED_MIB = 8
#: The file system on which layers are compressed as well.
AT_REST = "ext4"


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


async def measure(shop: Workshop) -> Samples:
    taken: list[Taken] = []
    made: list[images.Made] = []
    steps: list[at_rest.Step] = []
    for kind in KINDS:
        shop.say(f"{kind}: a base and {LINKS} links")
        with mounted(kind, DISK_BYTES) as root:
            async with Engine.open(root / "home") as engine:
                taken += await _chain(engine, root, kind)
                if kind == AT_REST:
                    shop.say(f"{kind}: compression at rest")
                    steps = await at_rest.measure(engine, "base", shop.iterations)
        shop.say(f"{kind}: images")
        made += await asyncio.to_thread(images.measure, kind, shop.iterations)
    return {"disk": taken, "disk-images": made, "disk-at-rest": steps}


async def _chain(engine: Engine, root: Path, kind: str) -> list[Taken]:
    empty = await asyncio.to_thread(used_bytes, root)
    await engine.from_image("debian", "base")
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
        images.table(samples["disk-images"]),
        at_rest.table(samples["disk-at-rest"]),
    ]


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
    rows={"disk": Taken, "disk-images": images.Made, "disk-at-rest": at_rest.Step},
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
    wrong=wrong,
)
