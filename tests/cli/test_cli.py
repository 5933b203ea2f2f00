"""The command line as its users meet it: exit codes, and only the answer on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ratoon.store.snapshot.store import Store
from small_snapshots import publish


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A store with base and L1 on it."""
    store = Store.open(tmp_path / "home")
    base = publish(store, "base")
    publish(store, "L1", parent=base)
    return store.home


def ratoon(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("ratoon")
    environment = {**os.environ, "RATOON_HOME": str(home), "RATOON_RUNTIME": str(home.parent / "r")}
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_images_lists_what_there_is(home: Path) -> None:
    done = ratoon(home, "images")
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0][:3] == ["TAG", "PARENT", "DEPTH"]
    assert [row[:3] for row in rows[1:]] == [["L1", "base", "1"], ["base", "-", "0"]]


def test_images_shows_a_damaged_snapshot_beside_the_others(home: Path) -> None:
    (home / "snapshots/L1/manifest.json").write_text("{}")
    listed = json.loads(ratoon(home, "images", "--json").stdout)
    assert [entry["tag"] for entry in listed] == ["L1", "base"]
    assert "manifest.json" in listed[0]["error"]
    assert "error" not in listed[1]


def test_snapshot_info_as_json_leaves_out_what_is_not_there(home: Path) -> None:
    detail = json.loads(ratoon(home, "snapshot-info", "L1", "--json").stdout)
    assert detail["parent_tag"] == "base"
    assert detail["parent_content_hash"].startswith("blake3:")
    assert detail["ancestors"] == ["base"]
    assert "parent_tag" not in json.loads(ratoon(home, "snapshot-info", "base", "--json").stdout)


def test_rmi_refuses_a_parent_and_names_who_needs_it(home: Path) -> None:
    done = ratoon(home, "rmi", "base")
    assert (done.returncode, done.stdout) == (4, "")
    assert "L1" in done.stderr
    assert ratoon(home, "rmi", "L1", "base").returncode == 0
    assert json.loads(ratoon(home, "images", "--json").stdout) == []


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("snapshot-info", "absent"), 3, "absent"),
        (("snapshot-info", "../base"), 2, "bad tag"),
        (("rmi", "absent"), 3, "absent"),
        (("from-image", "debian", "--tag", "a/b"), 2, "bad tag"),
        (("from-image", "127.0.0.1:1/gentoo", "--tag", "ok"), 1, "gentoo"),
        (("from-image", "gen too", "--tag", "ok"), 2, "gen too"),
        (("from-image", "debian", "--tag", "ok", "--mem-size-mib", "1"), 2, "--mem-size-mib: "),
        (("snapshot-diff", "--from", "absent", "--tag", "x", "--exec", "true"), 3, "absent"),
        (("snapshot-diff", "--from", "base", "--tag", "x", "--exec", "'"), 2, "--exec"),
        (("snapshot-diff", "--from", "base", "--tag", "x", "--exec", ""), 2, "empty"),
        (("run", "-it", "--json", "base"), 125, "--json"),
        (("run", "--memory", "lots", "base", "true"), 2, "write MiB, or a number with K, M, G"),
        (("run", "--health-cmd", "", "debian"), 2, "--health-cmd is empty"),
        (("run", "--health-log", "", "debian"), 2, "--health-log is empty"),
        (
            ("run", "--health-within", "3s", "debian"),
            2,
            "--health-within: there is no health check",
        ),
        (("kill", "--all", "--tag", "base"), 2, "--all"),
        (("ls", "--daemon-url", "nowhere"), 2, "unix:///PATH"),
        (("ls", "--daemon-url", "unix:///nowhere"), 1, "no daemon answers"),
        (("images", "--nonsense"), 2, "nonsense"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_bad_input_gets_its_exit_code_and_is_named(
    home: Path, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    done = ratoon(home, *arguments)
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_snapshot_ends_with_the_code_for_damage(home: Path) -> None:
    (home / "snapshots/L1/manifest.b3").write_text("0" * 64 + "\n")
    done = ratoon(home, "snapshot-info", "L1")
    assert done.returncode == 5
    assert "snapshot L1" in done.stderr
