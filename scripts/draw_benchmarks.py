"""Bring the documents' benchmarks up to date: tables, plots and targets, from the CSV files.

::

    .venv/bin/python scripts/draw_benchmarks.py [--from build/bench] [--check]

`--from` takes new figures over from a directory that `ratoon bench` has written, first. What is
drawn comes from `docs/benchmarks/data` alone. `--check` writes nothing, and fails if anything would
be written: a test does the same.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ratoon.bench.bench import NAMES, Bench, load
from ratoon.bench.plots import svg
from ratoon.bench.samples import Samples
from ratoon.bench.tables import Target, markdown

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "benchmarks"
DATA = PAGES / "data"
#: Documents with targets of several benches in them.
OVERVIEWS = (ROOT / "README.md", PAGES / "README.md")

_BLOCK = re.compile(r"(<!-- bench: (?P<what>[a-z ,]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def drawn() -> dict[Path, str]:
    """What each generated file, and each page with generated blocks, should be."""
    made: dict[Path, str] = {}
    for bench in measured():
        samples = bench.read(DATA)
        for plot in bench.plots(samples):
            made[PAGES / f"{plot.name}.svg"] = svg(plot)
    for page in (*sorted(PAGES.glob("*.md")), ROOT / "README.md"):
        made[page] = _filled(page)
    return made


def measured() -> Iterator[Bench]:
    """The benches of which there are figures."""
    for name in NAMES:
        if (DATA / f"{name}.json").exists():
            yield load(name)


def _filled(page: Path) -> str:
    def block(match: re.Match[str]) -> str:
        what = match["what"]
        text = _overview(page, what) if page in OVERVIEWS else _report(what)
        return f"{match[1]}{text}{match[3]}"

    return _BLOCK.sub(block, page.read_text())


def _report(name: str) -> str:
    """All of one bench: how it was measured, plots, targets, tables."""
    if not (DATA / f"{name}.json").exists():
        return "\nThere are no figures yet.\n\n"
    bench = load(name)
    samples = bench.read(DATA)
    parts = [_conditions(name)]
    parts += [f"![{plot.title}]({plot.name}.svg)\n" for plot in bench.plots(samples)]
    parts.append(_targets(bench.targets(samples), "data/"))
    for table in bench.tables(samples):
        links = ", ".join(f"[{source}.csv](data/{source}.csv)" for source in table.sources)
        parts.append(f"**{table.title}** ({links})\n\n{markdown(table)}")
    return "\n" + "\n".join(parts) + "\n"


def _overview(page: Path, what: str) -> str:
    """The targets of the benches `what`, comma-separated, or of `all`."""
    to = "docs/benchmarks/" if page.parent == ROOT else ""
    wanted = list(NAMES) if what == "all" else [name.strip() for name in what.split(",")]
    rows: list[str] = []
    for bench in measured():
        if bench.name in wanted:
            rows += _target_lines(bench.targets(bench.read(DATA)), f"{to}data/")
    return "\n" + "\n".join([*_TARGET_HEAD, *rows]) + "\n\n"


_TARGET_HEAD = (
    "| what | target | measured | met | figures |",
    "| --- | ---: | ---: | ---: | --- |",
)


def _target_lines(targets: Any, data: str) -> list[str]:
    def line(target: Target) -> str:
        source = f"[{target.source}.csv]({data}{target.source}.csv)"
        return "| " + " | ".join((*target.cells, source)) + " |"

    return [line(target) for target in targets]


def _targets(targets: Any, data: str) -> str:
    return "\n".join([*_TARGET_HEAD, *_target_lines(targets, data)]) + "\n"


def _conditions(name: str) -> str:
    document = json.loads((DATA / f"{name}.json").read_text())
    machine, load_average = document["machine"], document["load_average"]
    before, after = load_average["before"][0], load_average["after"][0]
    return (
        f"Measured at commit {machine['commit']}: {machine['cpu']}, {machine['memory']} of memory, "
        f"Linux {machine['kernel']}, QEMU {machine['qemu']} ({document['accelerator']}), Python "
        f"{machine['python']}; {document['iterations']} rounds in {document['seconds']} s; load "
        f"average {before:.1f} before and {after:.1f} after "
        f"([{name}.json](data/{name}.json)).{_warning(before, machine['cpu'])}\n"
    )


def _warning(load: float, cpu: str) -> str:
    """What a reader should know of figures from a machine that had other things to do."""
    if load <= int(cpu.partition(" ")[0]):
        return ""
    return " **The machine was busy with other things: times are too long, and ratios uncertain.**"


def take_over(directory: Path) -> None:
    """Copy the figures of every bench that `directory` has; its samples are in the CSV files."""
    DATA.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        path = directory / f"{name}.json"
        if path.exists():
            document = json.loads(path.read_text())
            samples: Samples = document.pop("samples")
            for source in samples:
                shutil.copyfile(directory / f"{source}.csv", DATA / f"{source}.csv")
            (DATA / path.name).write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--from", dest="directory", type=Path, help="take figures over from here")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it would")
    options = parser.parse_args()
    if options.directory:
        take_over(options.directory)
    stale = [p for p, text in drawn().items() if not p.exists() or p.read_text() != text]
    for path in stale:
        print(("stale: " if options.check else "drawn: ") + str(path.relative_to(ROOT)))
        if not options.check:
            path.write_text(drawn()[path])
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
