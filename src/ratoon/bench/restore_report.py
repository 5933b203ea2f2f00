"""What the bench of restores found: its rows, and the tables, targets and plots that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import MIB, Samples
from ratoon.bench.tables import Table, Target, spread

WAYS = {
    "ratoon": "Ratoon, a fork",
    "loadvm": "QEMU, -loadvm",
    "migrate": "QEMU, from a migration to a file",
    "virsh": "libvirt, virsh restore",
    "boot": "a cold boot",
}
CACHES = {"warm": "warm", "dropped": "page cache dropped", "evicted": "and the image evicted"}


@dataclass(frozen=True)
class Restore:
    """One restore, until `echo` had printed. Times in ms; `ready_ms`: until it could be asked.

    `filled`: half of the RAM is in use.
    """

    way: str
    ram_mib: int
    depth: int
    filled: bool
    cache: str
    round: int
    first_output_ms: float
    ready_ms: float
    stages: str


@dataclass(frozen=True)
class Saved:
    """What it took to save a filled guest the peers' ways, ms; bytes of the migration's file."""

    ram_mib: int
    savevm_ms: float
    migrate_ms: float
    virsh_ms: float
    state_bytes: int


def _times(rows: Sequence[Restore], way: str, ram: int, cache: str, **more: object) -> list[float]:
    wanted = {"way": way, "ram_mib": ram, "cache": cache, **more}
    return [
        row.first_output_ms
        for row in rows
        if all(getattr(row, name) == value for name, value in wanted.items())
    ]


def _sizes(rows: Sequence[Restore]) -> list[int]:
    return sorted({row.ram_mib for row in rows if row.way == "loadvm"})


def tables(samples: Samples) -> Sequence[Table]:
    rows = samples["restore"]
    return [_peers(rows), _depths(rows), _stages(rows), _saves(samples["restore-saves"])]


def _peers(rows: Sequence[Restore]) -> Table:
    cells = []
    for ram in _sizes(rows):
        for way, name in WAYS.items():
            filled = way != "boot"
            warm = _times(rows, way, ram, "warm", filled=filled)
            ours = median(_times(rows, "ratoon", ram, "warm", filled=True))
            found = [_times(rows, way, ram, cache, filled=filled) for cache in CACHES]
            cells.append(
                (
                    f"{ram}",
                    name,
                    f"{len(warm)}",
                    *(spread(times, 0) if times else "" for times in found),
                    f"{median(warm) / ours:.1f}",
                )
            )
    columns = ("RAM MiB", "way", "n", *CACHES.values(), "warm, ÷ Ratoon")
    title = "Until the first output, half of the RAM in use, ms; median (least…most)"
    return Table(title, columns, tuple(cells), ("restore",), 2)


def _depths(rows: Sequence[Restore]) -> Table:
    cells = []
    for depth in sorted({row.depth for row in rows if row.way == "ratoon" and not row.filled}):
        found = [_times(rows, "ratoon", 512, cache, depth=depth, filled=False) for cache in CACHES]
        cells.append((f"{depth}", *(spread(times) if times else "" for times in found)))
    title = "Forks of a 512 MiB guest until the first output, by depth, ms"
    return Table(title, ("depth", *CACHES.values()), tuple(cells), ("restore",))


def _stages(rows: Sequence[Restore]) -> Table:
    cells = []
    names: dict[str, None] = {}
    found = []
    for ram in _sizes(rows):
        for cache in CACHES:
            of_case = [
                row
                for row in rows
                if (row.way, row.ram_mib, row.cache, row.filled) == ("ratoon", ram, cache, True)
            ]
            parsed = [dict(pair.split("=") for pair in row.stages.split()) for row in of_case]
            first_exec = [row.first_output_ms - row.ready_ms for row in of_case]
            found.append((ram, cache, parsed, first_exec))
            names.update(dict.fromkeys(name for stages in parsed for name in stages))
    for ram, cache, parsed, first_exec in found:
        if not parsed:
            continue
        medians = (median(float(each.get(name, 0)) for each in parsed) for name in names)
        last = f"{median(first_exec):.1f}"
        cells.append((f"{ram}", CACHES[cache], *(f"{ms:.1f}" for ms in medians), last))
    columns = ("RAM MiB", "cache", *names, "echo")
    return Table("Stages of Ratoon's forks, median ms", columns, tuple(cells), ("restore",), 2)


def _saves(rows: Sequence[Saved]) -> Table:
    cells = tuple(
        (
            f"{row.ram_mib}",
            f"{row.savevm_ms:,.0f}",
            f"{row.migrate_ms:,.0f}",
            f"{row.virsh_ms:,.0f}",
            f"{row.state_bytes / MIB:,.0f}",
        )
        for row in rows
    )
    columns = ("RAM MiB", "savevm ms", "migrate ms", "virsh save ms", "file MiB")
    return Table("What it took to save it the peers' ways", columns, cells, ("restore-saves",))


def targets(samples: Samples) -> Sequence[Target]:
    rows = samples["restore"]
    sizes = _sizes(rows)
    ours = {ram: median(_times(rows, "ratoon", ram, "warm", filled=True)) for ram in sizes}
    theirs = {ram: median(_times(rows, "loadvm", ram, "warm")) for ram in sizes}
    ratios = {ram: theirs[ram] / ours[ram] for ram in sizes}
    least, most = sizes[0], sizes[-1]
    found = [
        Target(f"loadvm / our restore, {least} MiB", ratios[least], "≥", 3, "restore"),
        Target(
            f"our restore, {most} MiB / {least} MiB", ours[most] / ours[least], "≤", 1.15, "restore"
        ),
    ]
    found += [
        Target(
            f"loadvm / our restore, {ram} MiB, to that with half the RAM",
            ratios[ram] / ratios[before],
            "≥",
            1,
            "restore",
        )
        for before, ram in pairwise(sizes)
    ]
    return found


def plots(samples: Samples) -> Sequence[Plot]:
    rows = samples["restore"]
    drawn = []
    for way, cache in (
        *(("ratoon", "warm"), ("ratoon", "dropped"), ("loadvm", "warm")),
        *(("loadvm", "dropped"), ("migrate", "warm"), ("virsh", "warm"), ("boot", "warm")),
    ):
        points = (
            (f"{ram}", tuple(_times(rows, way, ram, cache, filled=way != "boot")))
            for ram in _sizes(rows)
        )
        name = f"{way}{', cache dropped' if cache == 'dropped' else ''}"
        drawn.append(Series(name, tuple((x, times) for x, times in points if times)))
    title = "From a snapshot to the first output, half of the RAM in use"
    return [Plot("restore", title, "RAM, MiB", "ms (log)", tuple(drawn), log=True)]
