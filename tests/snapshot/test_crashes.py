"""Processes that are killed or busy in the same store: nothing is torn, nobody's work is swept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ratoon.errors import InFlight
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import verify_disks
from small_snapshots import publish


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


def tags(store: Store) -> list[str]:
    return [found.manifest.tag for found in store.list() if isinstance(found, Snapshot)]


def start(store: Store, script: str) -> subprocess.Popen[str]:
    """Run a script in another process, with `store` and the helpers of this folder."""
    prelude = f"""
        import os, signal, sys, time
        from pathlib import Path
        from small_snapshots import publish, write_snapshot
        from ratoon import files
        from ratoon.store.snapshot import staging as staging_module
        from ratoon.store.snapshot.store import Store
        store = Store.open(Path({str(store.home)!r}))
        def child(s): return write_snapshot(store, s, parent=store.get("base"))
        def die(*_): os.kill(os.getpid(), signal.SIGKILL)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        text=True,
    )


@pytest.mark.parametrize(
    ("script", "survives"),
    [
        ("with store.stage('t') as s: die()", False),
        (
            "with store.stage('t') as s: child(s); die()",
            False,
        ),
        ("staging_module.encode = die; publish(store, 't', parent=store.get('base'))", False),
        ("files.fsync_path = die; publish(store, 't', parent=store.get('base'))", False),
        ("Path.rename = die; publish(store, 't', parent=store.get('base'))", False),
        (
            "with store.stage('t') as s: s.publish(child(s)); die()",
            True,
        ),
    ],
)
def test_a_kill_leaves_the_old_state_or_the_new(store: Store, script: str, survives: bool) -> None:
    base = publish(store, "base")
    with start(store, script) as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert len(list(store.staging.iterdir())) == (0 if survives else 1)
    store = Store.open(store.home)
    assert list(store.staging.iterdir()) == []
    assert tags(store) == (["base", "t"] if survives else ["base"])
    verify_disks(base)
    if survives:
        verify_disks(store.get("t"))


def test_a_kill_while_deleting_leaves_no_half_snapshot(store: Store) -> None:
    publish(store, "t")
    with start(store, "import shutil; shutil.rmtree = die; store.delete('t')") as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert tags(store) == []
    assert list(Store.open(store.home).staging.iterdir()) == []


def test_the_work_of_another_process_is_not_swept(store: Store) -> None:
    script = """
        with store.stage("held") as staging:
            manifest = write_snapshot(store, staging)
            print("ready", flush=True)
            sys.stdin.readline()
            staging.publish(manifest)
    """
    with start(store, script) as process:
        assert process.stdout
        assert process.stdin
        assert process.stdout.readline() == "ready\n"
        store = Store.open(store.home)
        assert (store.staging / "held" / "disk.qcow2").exists()
        with pytest.raises(InFlight, match="snapshot held"), store.stage("held"):
            pass
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == 0
    verify_disks(store.get("held"))
