"""What differs between two snapshots, and nothing left of the comparison."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from ext4_for_snapshots import as_layer, file_system
from processes import children, is_running, until
from ratoon.errors import Corrupt, HostError, Incompatible, NotFound
from ratoon.store.disk import flatten as flatten_module
from ratoon.store.disk.qcow2 import file_digest
from ratoon.store.disk.tree import ChangedFile, FileChanges
from ratoon.store.snapshot import diff as diff_module
from ratoon.store.snapshot.diff import Difference, diff
from ratoon.store.snapshot.store import Store
from small_snapshots import empty_overlay, make_layer, poke, publish, qemu_io, write_snapshot

DISK = 16 << 20
NOTHING = FileChanges((), (), ())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """base has a file system; `edited` on it has other files and memory, `same` nothing new."""
    store = Store.open(tmp_path / "home")
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "gone").write_text("gone")
    (root / "etc" / "longer").write_text("short")
    (root / "etc" / os.fsdecode(b"\xff\n")).write_text("odd")
    raw = file_system(tmp_path / "base.raw", root, DISK)
    base = publish(
        store, "base", {0: 1, 5: 2, 9: 3}, write_disk=partial(as_layer, raw), disk_bytes=DISK
    )
    (root / "etc" / "gone").unlink()
    (root / "etc" / "longer").write_text("no longer short")
    os.utime(root / "etc" / "longer", ns=(0, 2 * 10**18))
    (root / "new").write_bytes(b"n" * 100_000)
    edited = file_system(tmp_path / "edited.raw", root, DISK)
    publish(
        store,
        "edited",
        {5: 7, 9: 3, 10: 8},  # one changed, one not, one new
        parent=base,
        write_disk=partial(as_layer, edited, below=raw),
        disk_bytes=DISK,
    )
    nothing = partial(empty_overlay, disk_bytes=DISK)
    publish(store, "same", {}, parent=base, write_disk=nothing, disk_bytes=DISK)
    return store


def _write(command: str, path: Path) -> None:
    make_layer(path, command)


EDITED = FileChanges(
    added=(b"new",),
    removed=(b"etc/gone",),
    changed=(ChangedFile(b"etc/longer", ("size", "mtime")),),
)


def nothing_left(store: Store) -> bool:
    return list(store.staging.iterdir()) == []


def test_a_child_and_its_parent(store: Store, tmp_path: Path) -> None:
    said: list[str] = []
    found = diff(store, "base", "edited", said.append)
    raws = [(tmp_path / name).read_bytes() for name in ("base.raw", "edited.raw")]
    grains = range(0, DISK, 4096)
    expected = sum(raws[0][at : at + 4096] != raws[1][at : at + 4096] for at in grains) * 4096
    assert expected > 100_000
    assert found == Difference(
        ram_pages=256,
        changed_pages=2,
        disk_bytes=DISK,
        changed_disk_bytes=expected,
        files=EDITED,
    )
    assert said[0] == "checking the disk of base"
    assert nothing_left(store)


def test_the_other_way_round(store: Store) -> None:
    there, back = diff(store, "base", "edited"), diff(store, "edited", "base")
    assert there.files is not None
    assert back.files is not None
    assert (back.files.added, back.files.removed) == (there.files.removed, there.files.added)
    assert back.changed_disk_bytes == there.changed_disk_bytes
    assert back.changed_pages == there.changed_pages


def test_equal_snapshots(store: Store) -> None:
    for left, right in (("base", "base"), ("base", "same"), ("same", "base")):
        found = diff(store, left, right)
        assert (found.changed_pages, found.changed_disk_bytes, found.files) == (0, 0, NOTHING)
    assert nothing_left(store)


def test_the_same_chain_is_not_even_flattened(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flatten_module, "tool", None)
    assert diff(store, "edited", "edited").files == NOTHING


def test_siblings(store: Store) -> None:
    found = diff(store, "same", "edited")
    assert found.files is not None
    assert found.files.added == (b"new",)
    assert found.changed_pages == 2


def test_disks_that_hold_no_file_system(store: Store) -> None:
    for tag, fill in (("x", "0x41"), ("y", "0x42")):
        command = f"write -P {fill} 0 64k"
        publish(store, tag, {}, write_disk=partial(_write, command))
    found = diff(store, "x", "y")
    assert found.changed_disk_bytes == 64 * 1024
    assert found.files is None
    assert found.no_files == "the disk of snapshot x holds no ext4 file system"
    assert nothing_left(store)


def test_a_journal_is_replayed_on_the_copy(store: Store) -> None:
    base = store.get("base")

    def unclean(path: Path) -> None:
        empty_overlay(path, DISK)
        raw = path.with_name("raw")
        layers = [base.disk_path(0)]
        flatten_module.flatten_raw(layers, raw)
        subprocess.run(
            ["debugfs", "-w", "-R", "feature needs_recovery", raw], capture_output=True, check=True
        )
        block = raw.read_bytes()[:65536]
        patch = path.with_name("patch")
        patch.write_bytes(block)
        qemu_io(path, f"write -s {patch} 0 64k")
        raw.unlink()
        patch.unlink()

    publish(store, "unclean", {}, parent=base, write_disk=unclean, disk_bytes=DISK)
    digest = store.get("unclean").manifest.layers[-1].disk.digest
    found = diff(store, "base", "unclean")
    assert found.changed_disk_bytes == 4096
    assert found.files == NOTHING
    assert file_digest(store.get("unclean").disk_path(1)) == digest


def test_machines_of_different_size(store: Store, tmp_path: Path) -> None:
    with store.stage("small") as staging:
        manifest = write_snapshot(store, staging, {})
        machine = manifest.machine.model_copy(update={"ram_bytes": 4096})
        staging.publish(manifest.model_copy(update={"machine": machine}))
    with pytest.raises(Incompatible, match="base has 1048576 bytes and small has 4096 bytes"):
        diff(store, "base", "small")


def test_unknown_and_damaged_snapshots(store: Store) -> None:
    with pytest.raises(NotFound, match="nobody"):
        diff(store, "base", "nobody")
    edited = store.get("edited")
    path = edited.disk_path(1)
    poke(path, path.stat().st_size // 2)
    (edited.path / "verified.json").unlink()
    with pytest.raises(Corrupt, match=r"snapshot edited.*disk\.qcow2"):
        diff(store, "base", "edited")
    assert nothing_left(store)


@pytest.mark.parametrize(
    "name", ["verify_disks", "flatten_raw", "changed_bytes", "replay_journal", "compare_trees"]
)
def test_a_failure_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*arguments: object) -> None:
        raise HostError("injected")

    monkeypatch.setattr(diff_module, name, fail)
    with pytest.raises(HostError, match="injected"):
        diff(store, "base", "edited")
    assert nothing_left(store)


def test_snapshots_deleted_meanwhile(store: Store) -> None:
    def delete(message: str) -> None:
        if message == "checking the disk of base":
            store.delete("base", cascade=True)

    found = diff(store, "base", "edited", delete)
    assert found.files is not None
    assert found.files.added == (b"new",)


def ratoon(store: Store, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "RATOON_HOME": str(store.home),
        "RATOON_RUNTIME": str(store.home / "run"),
        "COLUMNS": "200",
    }
    return subprocess.run(
        [Path(sys.executable).with_name("ratoon"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_verb(store: Store) -> None:
    done = ratoon(store, "diff", "base", "edited")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("2 of 256 pages, ")
    assert lines == ["- /etc/gone", "~ /etc/longer  (size, mtime)", "+ /new"]
    assert "flattening the disk of edited" in done.stderr
    found = json.loads(ratoon(store, "diff", "base", "edited", "--json").stdout)
    assert found["files"]["added"] == ["/new"]
    assert found["files"]["changed"] == [{"path": "/etc/longer", "what": ["size", "mtime"]}]
    assert ratoon(store, "diff", "base", "nobody").returncode == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_comparison_leaves_nothing(
    store: Store, tmp_path: Path, number: signal.Signals
) -> None:
    script = f"""
import sys
from pathlib import Path
from disk_tools import scripts
from ratoon.cli import program
sys.argv[1:] = ["diff", "base", "edited"]
with scripts(Path({str(tmp_path)!r}), {{"qemu-img": "exec busybox sleep 1000"}}):
    program()
"""
    environment = {
        **os.environ,
        "RATOON_HOME": str(store.home),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL
    )
    while not (tools := named("busybox", process.pid)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(30) == 130
    assert nothing_left(store)
    until(lambda: not any(map(is_running, tools)))


def named(name: str, parent: int) -> list[int]:
    """The children of a process that are called so by now."""
    found = []
    for pid in children(parent):
        with suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/comm").read_text() == f"{name}\n":
                found.append(pid)
    return found


def test_the_other_verbs(store: Store) -> None:
    tree = ratoon(store, "tree")
    assert tree.stdout.splitlines() == ["base", "├─ edited", "└─ same"]
    nodes = json.loads(ratoon(store, "tree", "--json").stdout)
    assert [(node["tag"], node["parent"]) for node in nodes] == [
        ("base", None),
        ("edited", "base"),
        ("same", "base"),
    ]
    whole = json.loads(ratoon(store, "du", "--json").stdout)
    assert whole["snapshots"].keys() == {"base", "edited", "same"}
    one = json.loads(ratoon(store, "du", "edited", "--json").stdout)
    assert one == whole["snapshots"]["edited"]
    assert one["own_bytes"] + one["shared_bytes"] == one["total_bytes"]
    info = json.loads(ratoon(store, "snapshot-info", "edited", "--json").stdout)
    assert {key: info[key] for key in one} == one
    assert "edited" in ratoon(store, "du").stdout
    made = ratoon(store, "snapshot-compact", "--from", "edited", "--to", "flat", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["chain_depth"] == 0
    assert ratoon(store, "snapshot-compact", "--from", "flat", "--to", "flat").returncode == 2
    assert ratoon(store, "snapshot-compact", "--from", "base", "--to", "flat").returncode == 4
    refused = ratoon(store, "rmi", "base")
    assert refused.returncode == 4
    assert "--cascade" in refused.stderr
    assert ratoon(store, "rmi", "base", "--cascade", "--force").returncode == 2
    gone = ratoon(store, "rmi", "base", "same", "--cascade")
    assert gone.returncode == 0, gone.stderr
    assert ratoon(store, "tree").stdout.splitlines() == ["flat"]
