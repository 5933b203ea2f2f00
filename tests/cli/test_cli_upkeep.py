"""`ratoon prune` and `ratoon compress` as their users meet them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memory_helpers import last_data_byte
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.usage import usage
from small_snapshots import poke, publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """base, and on it a and b, in this order; all of them new."""
    store = Store.open(tmp_path / "home")
    base = publish(store, "base", dict.fromkeys(range(200), 1), created_at_unix=time.time())
    for n, tag in enumerate("ab"):
        layer = dict.fromkeys(range(n + 20), n + 2)
        publish(store, tag, layer, base, created_at_unix=time.time())
    return store


def ratoon(store: Store, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "RATOON_HOME": str(store.home),
        "RATOON_RUNTIME": str(store.home.with_name("run")),
        "COLUMNS": "200",
    }
    program = Path(sys.executable).with_name("ratoon")
    return subprocess.run(
        [str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_pruning(store: Store) -> None:
    done = ratoon(store, "prune", "--keep-last", "1", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "delete" in lines["a"]
    assert "no rule keeps it" in lines["a"]
    assert "one of the last 1 of its lineage" in lines["b"]
    assert "b was made from it" in lines["base"]
    assert "1 of 3 snapshots would free" in done.stdout
    assert (store.snapshots / "a").exists()

    before = usage(store).total
    done = ratoon(store, "prune", "--keep-last", "1", "--keep-within", "0", "--json")
    report = json.loads(done.stdout)
    assert [each["tag"] for each in report["snapshots"] if each["deleted"]] == ["a"]
    assert not (store.snapshots / "a").exists()
    assert before - usage(store).total == report["freed_bytes"]


def test_what_pruning_refuses(store: Store) -> None:
    done = ratoon(store, "prune")
    assert done.returncode == 2
    assert "say what to keep" in done.stderr
    assert ratoon(store, "prune", "--keep-within", "soon").returncode == 2
    done = ratoon(store, "prune", "--keep-last", "1", "--lineage", "absent")
    assert done.returncode == 3
    assert "absent" in done.stderr


def test_a_budget_that_cannot_be_held_is_told(store: Store) -> None:
    done = ratoon(store, "prune", "--max-bytes", "4k", "--dry-run")
    assert done.returncode == 0
    assert "lineage base: " in done.stderr
    assert "above its budget" in done.stderr


def test_compressing(store: Store) -> None:
    done = ratoon(store, "compress", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "3 layers would take" in done.stdout
    before = usage(store).total
    done = ratoon(store, "compress", "--json")
    layers = json.loads(done.stdout)["layers"]
    saved = sum(each["bytes_before"] - each["bytes_after"] for each in layers)
    assert before - usage(store).total == saved > 0
    assert "0 layers take" in ratoon(store, "compress").stdout
    assert "3 layers take" in ratoon(store, "compress", "--undo").stdout
    assert usage(store).total == before
    assert "0 layers" in ratoon(store, "compress", "--older-than", "1h").stdout


def test_a_layer_that_is_damaged_fails_the_command(store: Store) -> None:
    path = store.get("base").memory_path(0)
    poke(path, last_data_byte(path))
    done = ratoon(store, "compress")
    assert done.returncode == 1
    assert "base" in done.stdout
    assert "page 199 does not match" in done.stderr
    assert ratoon(store, "compress", "absent").returncode == 3
