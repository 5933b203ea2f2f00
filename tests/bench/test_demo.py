"""The demo's arithmetic and its verdict."""

from __future__ import annotations

import csv
from pathlib import Path

from ratoon.bench.demo import Measured, percentile, write_csv
from ratoon.bench.steps import HEADS, SIGNATURES, STEPS, probe_command


def measured_right() -> Measured:
    measured = Measured(rounds=2)
    for head in HEADS:
        samples = measured.samples[head.tag]
        if head.has:
            samples.probes_passed = samples.probes_run = 2 * len(head.has)
        else:
            samples.control_failed = samples.control_run = 2
    return measured


def test_percentile_is_the_smallest_value_that_so_many_do_not_exceed() -> None:
    values = [float(n) for n in range(1, 11)]
    assert percentile(values, 90) == 9
    assert percentile(values, 91) == 10
    assert percentile(values, 50) == 5
    assert percentile([7.0], 90) == 7


def test_one_probe_that_fails_makes_the_demo_wrong() -> None:
    assert measured_right().correct()
    measured = measured_right()
    measured.samples["L2"].probes_passed -= 1
    assert not measured.correct()


def test_one_control_that_passes_makes_the_demo_wrong() -> None:
    measured = measured_right()
    measured.samples["base"].control_failed -= 1
    assert not measured.correct()


def test_every_step_uses_the_one_before() -> None:
    for step in (2, 3):
        assert f"import step{step - 1}" in STEPS[step]
        assert SIGNATURES[step].startswith(SIGNATURES[step - 1])


def test_the_probes_tell_a_right_module_from_a_wrong_or_missing_one(tmp_path: Path) -> None:
    script = probe_command((1, 2, 3))[-1].replace("/opt/agent", str(tmp_path))
    (tmp_path / "step1.py").write_text(STEPS[1])
    (tmp_path / "step2.py").write_text("SIGNATURE = 'other'\ndef answer(): return 2\n")
    lines: list[str] = []
    exec(script, {"print": lambda *words: lines.append(" ".join(map(str, words)))})
    assert lines == ["ok 1", "missing 2", "missing 3"]


def test_the_csv_has_every_sample(tmp_path: Path) -> None:
    heads = {"base": {"fork": [1.5, 2.5], "first_fork": [], "first_exec": [3.0]}}
    write_csv(tmp_path / "new" / "out.csv", {"heads": heads})
    with (tmp_path / "new" / "out.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["head", "series", "number", "milliseconds"]
    assert rows[1:] == [
        ["base", "fork", "0", "1.500"],
        ["base", "fork", "1", "2.500"],
        ["base", "first_exec", "0", "3.000"],
    ]
