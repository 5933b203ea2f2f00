"""Tables, targets and plots: from rows to what is shown."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import ratoon.cli.bench  # noqa: F401
from ratoon.bench.bench import NAMES, load, wait_for_calm
from ratoon.bench.chain import Correct, wrong
from ratoon.bench.plots import Plot, Series, svg
from ratoon.bench.samples import read_rows, write_rows
from ratoon.bench.tables import Table, Target, markdown, spread
from ratoon.cli.app import app
from ratoon.errors import NotFound


def test_a_median_comes_with_its_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.0 (1.0…3.0)"
    assert spread([1234.5], 0) == "1,234"


def test_a_table_as_markdown() -> None:
    table = Table("t", ("what", "ms"), (("a", "1"), ("b", "2")), ("source",))
    assert markdown(table) == "| what | ms |\n| --- | ---: |\n| a | 1 |\n| b | 2 |\n"


@pytest.mark.parametrize(
    ("measured", "sense", "met"), [(1.0, "≤", True), (1.1, "≤", False), (0.9, "≥", False)]
)
def test_targets(measured: float, sense: str, met: bool) -> None:
    target = Target("x", measured, sense, 1.0, "source")  # type: ignore[arg-type]
    assert target.met is met
    assert ("no" in target.cells[3]) is not met


def test_a_target_that_is_missed_by_a_hair_shows_it() -> None:
    assert Target("x", 9.504, "≤", 9.5, "source").cells[1:] == ("≤ 9.5", "9.504", "**no**")


@pytest.mark.parametrize("log", [False, True])
def test_every_sample_is_a_dot(log: bool) -> None:
    series = (
        Series("a & b", (("0", (1.0, 2.0, 50.0)), ("8", (3.0,)))),
        Series("c", (("8", (4.0, 5.0)),)),
    )
    root = ElementTree.fromstring(svg(Plot("p", "t", "x", "y", series, log)))
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    dots = [each for each in circles if each.get("r") == "2.5"]
    assert len(dots) == 6
    for dot in dots:
        assert 0 < float(dot.get("cx", "")) < 760
        assert 0 < float(dot.get("cy", "")) < 380


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_of_every_bench_can_be_read_back(name: str, tmp_path: Path) -> None:
    values = {"str": "a, b", "int": 7, "float": 1.5, "bool": True}
    bench = load(name)
    assert bench.name == name
    for source, kind in bench.rows.items():
        row = kind(**{field.name: values[str(field.type)] for field in fields(kind)})
        write_rows(tmp_path / f"{source}.csv", [row])
        assert read_rows(tmp_path / f"{source}.csv", kind) == [row]


def test_a_bench_that_there_is_not() -> None:
    with pytest.raises(NotFound, match="chain"):
        load("chains")


def test_a_wrong_fork_and_a_control_that_passes_are_told() -> None:
    right = Correct("3", "ratoon", "warm", 0, probes=3, expected=3, passed=3)
    control = Correct("0", "ratoon", "warm", 0, probes=3, expected=0, passed=0)
    assert wrong({"correctness": [right, control]}) is None
    for bad in (
        Correct("3", "ratoon", "warm", 1, probes=3, expected=3, passed=2),
        Correct("0", "ratoon", "warm", 1, probes=3, expected=0, passed=1),
    ):
        assert "1 forks" in (wrong({"correctness": [right, control, bad]}) or "")
    assert "no control" in (wrong({"correctness": [right]}) or "")


def test_the_verb_lists_the_benches() -> None:
    listed = CliRunner().invoke(app, ["bench"])
    assert listed.exit_code == 0
    assert [line.split()[0] for line in listed.output.splitlines()] == [*NAMES]


def test_a_bench_waits_for_the_one_before_to_be_over(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [30.0, 10.0, 0.5]
    monkeypatch.setattr("os.getloadavg", lambda: (loads[0], 0, 0))
    monkeypatch.setattr("time.sleep", lambda _: loads.pop(0))
    said: list[str] = []
    wait_for_calm(said.append)
    assert loads == [0.5]
    assert [line.rpartition(" ")[2] for line in said] == ["30.0", "10.0"]
    loads[0] = 30.0
    wait_for_calm(said.append, within=0.0)
    assert loads == [30.0], "it waits for so long, and goes on"
