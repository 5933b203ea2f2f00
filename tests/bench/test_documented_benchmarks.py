"""The tables, plots and targets in the documents are what the committed CSV files say."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ratoon.bench.bench import NAMES, load

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/benchmarks"
MEASURED = [name for name in NAMES if (PAGES / f"data/{name}.json").exists()]
LINK = re.compile(r"\]\(([^)]+\.csv)\)")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts/draw_benchmarks.py"
    spec = importlib.util.spec_from_file_location("draw_benchmarks", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_what_is_drawn_is_what_the_figures_say(script: ModuleType) -> None:
    """If it fails: .venv/bin/python scripts/draw_benchmarks.py"""
    for path, text in script.drawn().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is stale"


def test_a_figure_that_was_changed_by_hand_is_noticed(script: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "chain.md"
    page.write_text((PAGES / "chain.md").read_text().replace("| 0 |", "| 1 |", 1))
    assert script._filled(page) == (PAGES / "chain.md").read_text()
    assert script._filled(page) != page.read_text()


@pytest.mark.parametrize("page", ["qemu", "jail"])
def test_a_comparison_is_that_of_its_samples(page: str) -> None:
    script, samples = ROOT / "scripts/compare.py", PAGES / f"data/{page}.csv"
    command = [sys.executable, str(script), "--read", str(samples)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"```\n{shown}```" in (PAGES / f"{page}.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_every_bench_has_a_page(name: str) -> None:
    assert f"<!-- bench: {name} -->" in (PAGES / f"{name}.md").read_text()
    assert f"[{name}]({name}.md)" in (PAGES / "README.md").read_text()


@pytest.mark.parametrize("name", MEASURED)
def test_the_page_of_a_bench_has_its_figures(name: str) -> None:
    page = (PAGES / f"{name}.md").read_text()
    for source in load(name).rows:
        assert f"data/{source}.csv" in page


PAGES_WITH_FIGURES = [
    *(ROOT / "README.md", PAGES / "README.md"),
    *(PAGES / f"{name}.md" for name in MEASURED),
]


@pytest.mark.parametrize("page", PAGES_WITH_FIGURES, ids=str)
def test_every_claim_links_to_figures_that_are_there(page: Path) -> None:
    blocks = re.findall(r"<!-- bench: .+? -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        links = LINK.findall(block)
        assert links
        for link in links:
            assert (page.parent / link).is_file(), link
        head = "| what | target |"
        claims = block.partition(head)[2].partition("\n\n")[0].splitlines()[2:]
        assert claims
        for line in claims:
            assert LINK.search(line), line


@pytest.mark.parametrize("name", MEASURED)
def test_the_targets_are_those_of_the_run(name: str) -> None:
    """So the CSV files and the JSON file are of one run."""
    document = json.loads((PAGES / f"data/{name}.json").read_text())
    bench = load(name)
    computed = {each.what: each.measured for each in bench.targets(bench.read(PAGES / "data"))}
    assert computed == {each["what"]: each["measured"] for each in document["targets"]}
    for key in ("machine", "accelerator", "load_average", "iterations"):
        assert document[key]


def test_no_documented_run_went_wrong() -> None:
    for name in MEASURED:
        bench = load(name)
        assert bench.wrong(bench.read(PAGES / "data")) is None
