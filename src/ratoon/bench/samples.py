"""What benches share: rows of samples as CSV, percentiles, reads from disks, the page cache."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import quantiles
from typing import Any, TypeVar

#: The rows of each CSV file, by its name without `.csv`; those of one are dataclasses of one kind.
Samples = Mapping[str, Sequence[Any]]

_Row = TypeVar("_Row")
#: How the fields of rows are read: their annotations are strings.
_PARSERS: dict[str, Callable[[str], object]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": lambda text: text == "True",
}


def milliseconds(seconds: float) -> float:
    """As samples have them: to the microsecond."""
    return round(seconds * 1e3, 3)


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """One line for each of `rows`, dataclasses of one kind; the columns are their fields."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, [field.name for field in fields(rows[0])], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_rows(path: Path, kind: type[_Row]) -> list[_Row]:
    """What `write_rows` wrote, as rows of that kind; its fields are str, int, float or bool."""
    parsers = {field.name: _PARSERS[str(field.type)] for field in fields(kind)}  # type: ignore[arg-type]
    with path.open(newline="") as file:
        return [
            kind(**{name: parsers[name](text) for name, text in row.items()})
            for row in csv.DictReader(file)
        ]


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


def forget_files(*directories: Path) -> None:
    """Have the page cache drop all files below these directories, once they are on the disk.

    What a process has mapped stays (posix_fadvise(2)); programs, such as QEMU itself, stay too.
    """
    for directory in directories:
        for path in directory.rglob("*"):
            if path.is_symlink() or not path.is_file():
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
