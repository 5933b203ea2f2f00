"""Writing snapshots: full against diff, by what the guest dirtied and by the size of its RAM.

Times are the engine's own: the pause is what the guest stands still, the publish what follows once
it runs again. Beside each diff the same bytes are written and fsynced, and no more.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ratoon.bench.bench import PREFIX, Bench, Workshop
from ratoon.bench.dirtying import dirty
from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import Samples
from ratoon.bench.tables import Table, Target, spread
from ratoon.units import MIB

SMALL = 512
#: MiB that are dirtied, by MiB of RAM; and how many of the rounds there are.
CASES = {
    512: ((0, 1, 8, 64, 256), 1.0),
    1024: ((8, 64), 0.5),
    2048: ((8, 64), 0.5),
    4096: ((8, 64), 0.5),
}
#: Stages that follow once the guest runs again.
AFTERWARDS = ("pack", "digest", "publish", "flatten")


@dataclass(frozen=True)
class Write:
    """One branch. Times in ms; `plain_ms`: writing and fsyncing the bytes of its memory layer."""

    ram_mib: int
    dirtied_mib: int
    mode: str
    round: int
    pause_ms: float
    publish_ms: float
    total_ms: float
    captured_pages: int
    logical_bytes: int
    physical_bytes: int
    plain_ms: float
    stages: str


async def measure(shop: Workshop) -> Samples:
    rows = []
    rounds = {ram: max(1, round(shop.iterations * share)) for ram, (_, share) in CASES.items()}
    for ram in CASES:
        await shop.base(ram * MIB)
    for number in range(shop.iterations):
        shop.say(f"round {number + 1} of {shop.iterations}")
        for ram, (dirtied, _) in CASES.items():
            for mib in dirtied if number < rounds[ram] else ():
                modes = ("diff", "full") if number % 2 else ("full", "diff")
                rows += [await _write(shop, ram, mib, mode, number) for mode in modes]
    return {"diff": rows}


async def _write(shop: Workshop, ram_mib: int, dirtied_mib: int, mode: str, number: int) -> Write:
    engine, tag = shop.engine, f"{PREFIX}written"
    async with await engine.fork_one(shop.base_tag(ram_mib * MIB)) as sandbox:
        if dirtied_mib:
            await dirty(sandbox, dirtied_mib)
        branched = await engine.branch(sandbox, tag, "full" if mode == "full" else "diff")
    try:
        path = branched.snapshot.memory_path(branched.snapshot.depth)
        status = path.stat()
        plain = await asyncio.to_thread(_write_plainly, path, shop.room / "plain")
        after = sum(branched.stages.get(stage, 0.0) for stage in AFTERWARDS)
        return Write(
            ram_mib=ram_mib,
            dirtied_mib=dirtied_mib,
            mode=mode,
            round=number,
            pause_ms=branched.pause_ms,
            publish_ms=round(after, 3),
            total_ms=round(sum(branched.stages.values()), 3),
            captured_pages=branched.captured_pages,
            logical_bytes=status.st_size,
            physical_bytes=status.st_blocks * 512,
            plain_ms=plain,
            stages=" ".join(f"{name}={ms}" for name, ms in branched.stages.items()),
        )
    finally:
        await engine.delete(tag)


def _write_plainly(source: Path, target: Path) -> float:
    """ms that it takes to write the content of `source`, which is in memory then, and to fsync."""
    content = source.read_bytes()
    began = time.perf_counter()
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    took = (time.perf_counter() - began) * 1e3
    target.unlink()
    return round(took, 3)


def _of(rows: Sequence[Write], ram: int, dirtied: int, mode: str) -> list[Write]:
    key = (ram, dirtied, mode)
    return [row for row in rows if (row.ram_mib, row.dirtied_mib, row.mode) == key]


def _cases(rows: Sequence[Write]) -> list[tuple[int, int]]:
    return sorted({(row.ram_mib, row.dirtied_mib) for row in rows})


def _ratio(above: Sequence[Write], below: Sequence[Write]) -> float:
    return median(row.total_ms for row in above) / median(row.total_ms for row in below)


def tables(samples: Samples) -> Sequence[Table]:
    rows = samples["diff"]
    cells = []
    for ram, dirtied in _cases(rows):
        full, diff = _of(rows, ram, dirtied, "full"), _of(rows, ram, dirtied, "diff")
        publish, plain = (
            median(getattr(row, name) for row in diff) for name in ("publish_ms", "plain_ms")
        )
        cells.append(
            (
                f"{ram}",
                f"{dirtied}",
                f"{len(diff)}",
                spread(row.pause_ms for row in diff),
                spread((row.publish_ms for row in diff), 0),
                f"{publish / plain:.2f}",
                spread((row.total_ms for row in diff), 0),
                spread((row.total_ms for row in full), 0),
                f"{_ratio(full, diff):.1f}",
                f"{median(row.logical_bytes for row in diff) / MIB:.1f}",
                f"{median(row.physical_bytes for row in diff) / MIB:.1f}",
                f"{median(row.physical_bytes for row in full) / MIB:.1f}",
            )
        )
    columns = (
        *("RAM MiB", "dirtied MiB", "n", "pause ms", "publish ms", "÷ plain write"),
        *("diff, all ms", "full, all ms", "full ÷ diff"),
        *("diff MiB", "on disk", "full on disk"),
    )
    title = "A branch: median (least…most)"
    return [Table(title, columns, tuple(cells), ("diff",), 2)]


def targets(samples: Samples) -> Sequence[Target]:
    rows = samples["diff"]
    full, diff = _of(rows, SMALL, 8, "full"), _of(rows, SMALL, 8, "diff")
    publish = median(row.publish_ms for row in diff) / median(row.plain_ms for row in diff)
    largest = _of(rows, max(CASES), 8, "diff")
    pauses = median(row.pause_ms for row in largest) / median(row.pause_ms for row in diff)
    return [
        Target("full / diff write, 8 MiB dirtied", _ratio(full, diff), "≥", 8.6, "diff"),
        Target("a diff's publish / plain write and fsync, 8 MiB", publish, "≤", 2, "diff"),
        Target("a diff's pause, 4 GiB / 512 MiB of RAM", pauses, "≤", 1.25, "diff"),
    ]


def plots(samples: Samples) -> Sequence[Plot]:
    rows = samples["diff"]
    dirtied = [mib for ram, mib in _cases(rows) if ram == SMALL]

    def series(name: str, mode: str, field: str) -> Series:
        points = ((f"{mib}", _of(rows, SMALL, mib, mode)) for mib in dirtied)
        return Series(name, tuple((x, tuple(getattr(r, field) for r in got)) for x, got in points))

    drawn = (
        series("full, all of it", "full", "total_ms"),
        series("diff, all of it", "diff", "total_ms"),
        series("diff, the pause", "diff", "pause_ms"),
        series("the diff's bytes, plainly written", "diff", "plain_ms"),
    )
    title = "Writing a snapshot of a 512 MiB guest"
    return [Plot("diff", title, "MiB dirtied", "ms (log)", drawn, log=True)]


def wrong(samples: Samples) -> str | None:
    for row in samples["diff"]:
        if row.logical_bytes < row.dirtied_mib * MIB:
            return f"a snapshot holds less than what was dirtied: {row}"
    return None


BENCH = Bench(
    name="diff",
    title="Full and diff snapshots",
    iterations=8,
    rows={"diff": Write},
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
    wrong=wrong,
)
