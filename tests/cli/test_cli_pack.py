"""`pack` and `unpack` as their users meet them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pack_helpers import content_of, publish_chain
from ratoon.store.snapshot.store import Store

TRUST = "unpack only what comes from somebody you trust"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with base, L1 and L2."""
    store = Store.open(tmp_path / "home")
    publish_chain(store)
    return store


@pytest.fixture
def other(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "other")


def ratoon(store: Store, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("ratoon")
    home = store.home
    environment = {**os.environ, "RATOON_HOME": str(home), "RATOON_RUNTIME": str(home.parent / "r")}
    return subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_there_and_back(store: Store, other: Store, tmp_path: Path) -> None:
    (tmp_path / "[").mkdir()
    out = tmp_path / "[/red].tar.zst"  # would be markup
    packed = ratoon(store, "pack", "--tag", "L2", "--out", out)
    assert (packed.returncode, packed.stdout) == (0, "")
    assert f"packed L2: 0.7 MiB, 0.0 MiB in {out}" in packed.stderr
    unpacked = ratoon(other, "unpack", out)
    assert unpacked.returncode == 0
    assert unpacked.stdout == ("L2: depth 2, 0.7 MiB of layers stored, 0.0 MiB were here already\n")
    assert content_of(other.get("L2")) == content_of(store.get("L2"))


def test_the_risk_is_said_once_and_not_on_stdout(store: Store, tmp_path: Path) -> None:
    ratoon(store, "pack", "--tag", "L2", "--out", tmp_path / "pack")
    for arguments in ((), ("--tag", "copy"), ("--force", "--json")):
        done = ratoon(store, "unpack", tmp_path / "pack", *arguments)
        assert " ".join(done.stderr.split()).count(TRUST) == 1
        assert "trust" not in done.stdout


def test_unpack_as_json(store: Store, tmp_path: Path) -> None:
    ratoon(store, "pack", "--tag", "L2", "--out", tmp_path / "pack")
    done = ratoon(store, "unpack", tmp_path / "pack", "--tag", "copy", "--json")
    answer = json.loads(done.stdout)
    manifest = store.get("copy").manifest
    layers = manifest.layers
    assert answer == {
        "tag": "copy",
        "dir": str(store.snapshots / "copy"),
        "chain_depth": 2,
        "memory_root": manifest.memory_root,
        "stored_bytes": 0,
        "shared_bytes": sum(layer.memory.size + layer.disk.size for layer in layers),
    }


def test_what_is_there_is_replaced_by_force_alone(store: Store, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    for force, exit_code in (((), 0), ((), 4), (("--force",), 0)):
        done = ratoon(store, "pack", "--tag", "L2", "--out", out, *force)
        assert done.returncode == exit_code
    for force, exit_code in (((), 4), (("--force",), 0)):
        assert ratoon(store, "unpack", out, *force).returncode == exit_code


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("pack", "--tag", "absent", "--out", "out"), 3, "no snapshot absent"),
        (("pack", "--tag", "a/b", "--out", "out"), 2, "bad tag"),
        (("pack", "--tag", "L2"), 2, "--out"),
        (("pack", "--out", "out"), 2, "--tag"),
        (("pack", "--tag", "L2", "--out", "/absent/out"), 2, "/absent"),
        (("pack", "--tag", "L2", "--out", "/tmp"), 2, "/tmp"),
        (("unpack", "/absent"), 3, "/absent"),
        (("unpack", "/dev/null"), 2, "not a regular file"),
        (("unpack", "/etc/passwd"), 5, "not a pack"),
        (("unpack", "/absent", "--tag", "a/b"), 2, "bad tag"),
        (("unpack",), 2, "Missing argument"),
    ],
)
def test_bad_input_gets_its_exit_code_and_is_named(
    store: Store, arguments: tuple[str, ...], exit_code: int, said: str
) -> None:
    done = ratoon(store, *arguments)
    assert (done.returncode, done.stdout) == (exit_code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_snapshot_or_pack_ends_with_the_code_for_damage(
    store: Store, other: Store, tmp_path: Path
) -> None:
    out = tmp_path / "pack"
    ratoon(store, "pack", "--tag", "L2", "--out", out)
    out.write_bytes(out.read_bytes()[:-1])
    done = ratoon(other, "unpack", out)
    assert (done.returncode, done.stdout) == (5, "")
    assert "cut short" in done.stderr
    (store.snapshots / "L2/disk.qcow2").write_bytes(b"")
    done = ratoon(store, "pack", "--tag", "L2", "--out", tmp_path / "again")
    assert (done.returncode, done.stdout) == (5, "")
    assert "snapshot L2, file" in done.stderr


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_pack_leaves_nothing(
    store: Store, tmp_path: Path, end: signal.Signals
) -> None:
    script = """
import sys, time
from ratoon.cli import main
from ratoon.store.pack import pack
def write(*_):
    print("writing", flush=True)
    time.sleep(60)
pack._write = write
main()
"""
    out = tmp_path / "out" / "pack"
    out.parent.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", script, "pack", "--tag", "L2", "--out", out],
        env={**os.environ, "RATOON_HOME": str(store.home)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
        assert len(list(out.parent.iterdir())) == 1
        process.send_signal(end)
        assert process.wait(timeout=30) == 130
    assert list(out.parent.iterdir()) == []
