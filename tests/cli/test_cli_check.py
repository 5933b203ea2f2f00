"""`ratoon check` as its users meet it: what it says, and with which exit code."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memory_helpers import last_data_byte
from ratoon.store.snapshot.store import Store
from small_snapshots import make_image, poke, publish


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A sound store: base, L1 on it, an image of L1."""
    store = Store.open(tmp_path / "home")
    base = publish(store, "base", {1: 1, 2: 2})
    make_image(store, publish(store, "L1", {2: 3}, base))
    return store.home


def command(home: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    program = Path(sys.executable).with_name("ratoon")
    environment = {**os.environ, "RATOON_HOME": str(home), "RATOON_RUNTIME": str(home.parent / "r")}
    return [str(program), "check", *arguments], environment


def check(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(home, *arguments)
    return subprocess.run(
        line,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def check_json(home: Path, *arguments: str) -> Any:
    return json.loads(check(home, "--json", *arguments).stdout)


def test_a_sound_store(home: Path) -> None:
    done = check(home)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "2 snapshots, 1 images: sound\n"
    done = check(home, "--read-data")
    assert (done.returncode, done.stderr) == (0, "")
    assert "MiB of data read: sound" in done.stdout
    assert check(home.with_name("nowhere")).returncode == 0
    assert not home.with_name("nowhere").exists()


def test_notes_do_not_count(home: Path) -> None:
    Store.open(home).delete("base", force=True)
    done = check(home)
    assert done.returncode == 0
    assert "parent gone: snapshot L1" in done.stdout


def test_damage_is_named_with_its_page_and_a_way_out(home: Path) -> None:
    memory = home / "snapshots/base/memory.bin"
    poke(memory, last_data_byte(memory))
    assert check(home).returncode == 0  # nothing but the data tells it
    done = check(home, "--read-data")
    assert done.returncode == 5
    assert f"damaged layer: snapshot base, file {memory}: page 2 does not match" in done.stdout
    assert "ratoon check --repair" in done.stdout
    assert "DAMAGED" in done.stdout
    report = check_json(home, "--read-data")
    assert (report["sound"], report["exit_code"], report["snapshots"]) == (False, 5, 2)
    (finding,) = report["findings"]
    assert {key: finding[key] for key in ("class", "severity", "snapshot", "file", "page")} == {
        "class": "damaged layer",
        "severity": "damage",
        "snapshot": "base",
        "file": str(memory),
        "page": 2,
    }


def test_litter_is_reported_before_anything_removes_it(home: Path) -> None:
    (home / "staging/left").mkdir()
    done = check(home)
    assert done.returncode == 1
    assert "litter" in done.stdout
    assert (home / "staging/left").is_dir()


def test_repair_in_a_script_needs_a_yes(home: Path) -> None:
    (home / "staging/left").mkdir()
    done = check(home, "--repair")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--yes" in done.stderr
    assert (home / "staging/left").exists()
    done = check(home, "--repair", "--yes")
    assert done.returncode == 0
    assert "repaired" in done.stdout
    assert not (home / "staging/left").exists()


def test_repair_removes_what_nobody_holds_and_remakes_what_it_can(home: Path) -> None:
    (home / "sandboxes/sb-1-2/parent").mkdir(parents=True)
    image = next((home / "images").glob("*.ram"))
    memory = home / "snapshots/L1/memory.bin"
    poke(memory, last_data_byte(memory))
    poke(home / "snapshots/base/vmstate", 0)
    report = check_json(home, "--read-data", "--repair", "--yes")
    assert {entry["file"]: entry["done"] for entry in report["repairs"]} == {
        str(memory): True,
        str(home / "snapshots/base/vmstate"): False,
        str(home / "sandboxes/sb-1-2"): True,
    }
    assert [finding["class"] for finding in report["findings"]] == ["damaged vmstate"]
    assert report["exit_code"] == 5
    assert image.exists()
    poke(image, 0)
    assert check(home, "--repair", "--yes").returncode == 5
    assert not image.exists()


def test_what_a_lost_manifest_hid_is_repaired_too(home: Path) -> None:
    memory = home / "snapshots/L1/memory.bin"
    poke(memory, 0)
    poke(home / "snapshots/L1/manifest.b3", 3)
    report = check_json(home, "--repair", "--yes")
    assert [entry["done"] for entry in report["repairs"]] == [True, True]
    assert report["findings"] == []


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("n", False)])
def test_repair_asks_who_sits_there(home: Path, answer: str, removed: bool) -> None:
    left = home / "staging/left"
    left.mkdir()
    line, environment = command(home, "--repair")
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        line,
        env=environment,
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.write(controller, f"{answer}\n".encode())
        output, asked = process.communicate(timeout=60)
    os.close(controller)
    os.close(terminal)
    assert f"{left}: remove it" in asked
    assert "Do this?" in asked
    assert left.exists() is not removed
    assert process.returncode == (0 if removed else 1)
    assert ("repaired" in output) is removed
    assert "litter" in asked


def test_slices(home: Path) -> None:
    memory = home / "snapshots/base/memory.bin"
    poke(memory, last_data_byte(memory))
    codes = [check(home, "--read-data", "--subset", f"{n}/3").returncode for n in (1, 2, 3)]
    assert sorted(codes) == [0, 0, 5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--read-data", "--subset", "3/2"), "n/t"),
        (("--subset", "1/2"), "--read-data"),
        (("--yes",), "--repair"),
    ],
)
def test_options_that_make_no_sense(home: Path, arguments: tuple[str, ...], said: str) -> None:
    done = check(home, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_a_store_of_another_format_is_refused(home: Path) -> None:
    (home / "store.json").write_text('{"format": 7}')
    done = check(home)
    assert (done.returncode, done.stdout) == (4, "")
    assert "format 7" in done.stderr


def test_the_help_documents_the_exit_codes(home: Path) -> None:
    text = " ".join(check(home, "--help").stdout.split())
    for words in ("0 sound", "1 nothing is lost", "5 a snapshot is damaged"):
        assert words in text
