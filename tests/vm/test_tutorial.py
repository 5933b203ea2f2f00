"""The tutorial: what it shows is the example, and the example does what the tutorial says."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

from served_daemon import Served
from vm_helpers import FOR_EVER, tags

pytest_plugins = ["daemon_plugin"]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/tree_search.py"
TUTORIAL = ROOT / "docs/tutorial.md"


async def output_of(*arguments: str, served: Served) -> str:
    """What Python prints; it must succeed, and not complain."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *arguments),
        stdout=PIPE,
        stderr=PIPE,
        env={**os.environ, "RATOON_URL": served.url},
    )
    out, err = await asyncio.wait_for(process.communicate(), FOR_EVER)
    assert (process.returncode, err) == (0, b"")
    return out.decode()


async def test_the_example_finds_the_vault_and_leaves_a_snapshot_alone(forked: Served) -> None:
    before = forked.engine.sandboxes, tags(forked.engine)
    out = await output_of(str(EXAMPLE), "base", served=forked)
    best, snapshot, later = out.splitlines()[-3:]
    assert best == "best: 96 ('ladder', 'door', 'shelf', 'safe')"
    assert later == "still there: vault"
    (made,) = tags(forked.engine) - before[1]
    assert snapshot == f"it goes on from snapshot {made}"
    assert forked.engine.sandboxes == before[0]


async def test_the_readme_does_what_it_shows(forked: Served) -> None:
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"```python\n(from ratoon import .*?)```", readme, re.S)
    out = await output_of("-c", shown, served=forked)
    result, *forks, snapshots = out.splitlines()
    assert result == "42"
    assert forks[::3] == ["42", "42", "42"]
    assert len({*forks[1::3]}) == 3
    assert "answer" in snapshots


def test_the_tutorial_shows_the_example_as_it_is() -> None:
    example = EXAMPLE.read_text()
    shown = re.findall(
        r"```python\n(# examples/tree_search\.py\n.*?)```", TUTORIAL.read_text(), re.S
    )
    assert len(shown) >= 3
    for block in shown:
        assert block.removeprefix("# examples/tree_search.py\n").strip() in example
