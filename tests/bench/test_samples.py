"""The figures that benches share."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from ratoon.bench.samples import percentile, read_bytes, write_rows


@dataclass(frozen=True)
class Row:
    name: str
    ms: float


def test_rows_as_csv(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [Row("a, b", 1.5), Row("c", 2)])
    with (tmp_path / "rows.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"name": "a, b", "ms": "1.5"},
            {"name": "c", "ms": "2"},
        ]


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([7], 95, 7), ([1, 3], 50, 2), (range(101), 95, 95), ([5, 1, 9], 50, 5)],
)
def test_percentiles(values: list[float], percent: int, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_what_a_process_reads_is_counted(tmp_path: Path) -> None:
    """What lies in the page cache is not read from a disk."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    before = read_bytes("self")
    assert len(path.read_bytes()) == 1 << 20
    assert read_bytes("self") - before < 1 << 20
