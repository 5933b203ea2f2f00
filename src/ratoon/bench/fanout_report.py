"""What the bench of bursts found: its rows, and the tables, targets and plots that follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import MIB, Samples
from ratoon.bench.tables import Table, Target, spread


@dataclass(frozen=True)
class Burst:
    """One burst. Times in ms; bytes of all its machines together.

    `read_bytes`: what they, and who started them, had fetched from disks.
    """

    what: str
    n: int
    round: int
    answered: int
    wall_ms: float
    fork_p50_ms: float
    fork_p95_ms: float
    exec_p50_ms: float
    private_bytes: int
    read_bytes: int


def _of(rows: Sequence[Burst], what: str, n: int) -> list[Burst]:
    return [row for row in rows if (row.what, row.n) == (what, n)]


def _wall(rows: Sequence[Burst], what: str, n: int) -> float:
    return median(row.wall_ms for row in _of(rows, what, n))


def tables(samples: Samples) -> Sequence[Table]:
    rows = samples["fanout"]
    cells = []
    for what, n in sorted(dict.fromkeys((row.what, row.n) for row in rows)):
        found = _of(rows, what, n)
        cells.append(
            (
                what,
                str(n),
                f"{sum(row.answered for row in found)}/{n * len(found)}",
                spread((row.wall_ms / 1e3 for row in found), 2),
                f"{median(row.wall_ms for row in found) / n:.0f}",
                *(
                    f"{median(getattr(row, f'fork_p{p}_ms') for row in found):.0f}"
                    for p in (50, 95)
                ),
                f"{median(row.exec_p50_ms for row in found):.0f}",
                f"{median(row.private_bytes for row in found) / n / MIB:.1f}",
                f"{median(row.read_bytes for row in found) / MIB:.1f}",
            )
        )
    columns = (
        *("burst", "n", "answered", "wall s", "ms each", "fork p50 ms", "p95"),
        *("first exec ms", "private MiB each", "disk read MiB"),
    )
    title = "Bursts until all have answered a command; median (least…most)"
    return [Table(title, columns, tuple(cells), ("fanout",))]


def targets(samples: Samples) -> Sequence[Target]:
    rows = samples["fanout"]
    cold = "nothing cached"
    (burst,) = {row.n for row in rows if row.what == cold and row.n > 1}
    one = median(row.read_bytes for row in _of(rows, cold, 1))
    many = median(row.read_bytes for row in _of(rows, cold, burst))
    found = []
    if one:
        what = f"disk read by {burst} forks with nothing cached / by one"
        found.append(Target(what, many / one, "≤", 1.5, "fanout"))
    (boots,) = {row.n for row in rows if row.what == "cold boots"}
    largest = max(row.n for row in rows)
    each = _wall(rows, "cold boots", boots) / boots * largest / _wall(rows, "forks", largest)
    what = f"{largest} cold boots at the same concurrency / {largest} forks"
    return [*found, Target(what, each, "≥", 10, "fanout")]


def plots(samples: Samples) -> Sequence[Plot]:
    rows = samples["fanout"]
    sizes = sorted({row.n for row in rows if row.what == "forks"})
    forks = Series(
        "forks", tuple((str(n), tuple(r.wall_ms for r in _of(rows, "forks", n))) for n in sizes)
    )
    names = sorted({row.what for row in rows if row.what.startswith("xfs")})
    inodes = []
    for cached in (True, False):
        points = (
            (name.split(", ")[1], tuple(r.wall_ms / r.n for r in rows if r.what == name))
            for name in names
            if name.endswith("nothing cached") != cached
        )
        inodes.append(Series("warm" if cached else "nothing cached", tuple(points)))
    (burst,) = {row.n for row in rows if row.what in names}
    title = f"{burst} forks on xfs, until all have answered"
    return [
        Plot(
            "fanout", "Forks at once, until all have answered", "forks", "ms (log)", (forks,), True
        ),
        Plot("fanout-inodes", title, "each fork maps", "ms a fork", tuple(inodes), linked=False),
    ]


def wrong(samples: Samples) -> str | None:
    missing = sum(row.n - row.answered for row in samples["fanout"])
    return f"{missing} machines did not answer" if missing else None
