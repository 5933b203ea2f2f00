"""What benches share: rows of samples as CSV, percentiles, and counters of processes."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import quantiles
from typing import Any

MIB = 1 << 20


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """One line for each of `rows`, dataclasses of one kind; the columns are their fields."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def percentile(values: Iterable[float], percent: int) -> float:
    """Interpolated, as `statistics.quantiles` does; of one value, that."""
    sorted_values = sorted(values)
    if len(sorted_values) == 1:
        return sorted_values[0]
    return quantiles(sorted_values, n=100, method="inclusive")[percent - 1]


def read_bytes(pid: int | str) -> int:
    """What process `pid` has had the kernel fetch from disks (proc(5), /proc/PID/io)."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def drop_caches() -> None:
    """Have the kernel forget all file pages that nobody maps; as root."""
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
