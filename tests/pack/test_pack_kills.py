"""Killed in the middle: the store is as it was, or has all of the snapshot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pack_helpers import content_of, publish_chain
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import verify_disks
from small_snapshots import publish

PRELUDE = """
    import ctypes, os, signal, sys
    from pathlib import Path
    from ratoon import files
    from ratoon.store.pack import memory_check, packfile, unpack as module
    from ratoon.store.snapshot import staging
    from ratoon.store.pack.pack import pack
    from ratoon.store.snapshot.store import Store
    from ratoon.store.pack.unpack import unpack
    def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
    def after(call, number=1):
        def counted(*arguments, **names):
            counted.calls += 1
            result = call(*arguments, **names)
            if counted.calls == number:
                die()
            return result
        counted.calls = 0
        return counted
    store, file = Store.open(Path(sys.argv[1])), Path(sys.argv[2])
"""


def run_and_die(store: Store, file: Path, script: str) -> None:
    program = textwrap.dedent(PRELUDE) + script
    done = subprocess.run(
        [sys.executable, "-c", program, store.home, file],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL


@pytest.fixture
def file(tmp_path: Path) -> Path:
    store = Store.open(tmp_path / "source")
    publish_chain(store)
    return pack(store, "L2", tmp_path / "pack").path


def tags(store: Store) -> list[str]:
    return [found.manifest.tag for found in store.list() if isinstance(found, Snapshot)]


BEFORE = [
    "module._read_manifest = die",
    "module._write = after(module._write, 1)",
    "module._write = after(module._write, 4)",
    "packfile.PackReader.finish = die",
    "module.verify_memory = die",
    "staging.encode = die",
    "staging._fsync_new = die",
]


@pytest.mark.parametrize(
    ("script", "survives"),
    [
        *((script, False) for script in BEFORE),
        ("Path.rename = die", False),
        ("Path.rename = after(Path.rename)", True),
    ],
)
def test_unpacking(tmp_path: Path, file: Path, script: str, survives: bool) -> None:
    store = Store.open(tmp_path / "home")
    run_and_die(store, file, f"{script}; unpack(store, file); die()")
    assert len(list(store.staging.iterdir())) == (0 if survives else 1)
    store = Store.open(store.home)
    assert list(store.staging.iterdir()) == []
    assert tags(store) == (["L2"] if survives else [])
    if survives:
        verify_disks(store.get("L2"))
    else:
        unpack(store, file)


@pytest.mark.parametrize(
    ("script", "survives"),
    [
        *((script, False) for script in BEFORE),
        ("staging.exchange = die", False),
        ("staging.exchange = after(staging.exchange)", True),
        ("Path.rename = after(Path.rename)", True),
        ("staging.shutil.rmtree = die", True),
    ],
)
def test_replacing(tmp_path: Path, file: Path, script: str, survives: bool) -> None:
    """At every instant there is one snapshot of the tag, whole."""
    store = Store.open(tmp_path / "home")
    old = content_of(publish(store, "L2", {9: 9}))
    run_and_die(store, file, f"{script}; unpack(store, file, force=True); die()")
    assert tags(store) == ["L2"]
    store = Store.open(store.home)
    assert list(store.staging.iterdir()) == []
    found = store.get("L2")
    assert (content_of(found) == old) is not survives
    verify_disks(found)
    unpack(store, file, force=True)
    assert store.get("L2").depth == 2


def test_packing(tmp_path: Path, file: Path) -> None:
    """It may leave a temporary file, but nothing under the name, and it is in nobody's way."""
    store = Store.open(tmp_path / "source")
    before = file.read_bytes()
    run_and_die(store, file, "os.fsync = die; pack(store, 'L2', file, force=True)")
    assert file.read_bytes() == before
    pack(store, "L2", file, force=True)
    assert file.read_bytes() == before
