"""Machines that nobody looks after are killed, and gone when that returns."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratoon.engine.sandbox.sweep import kill_strays

#: Like a machine: it holds a lock on its disk, and memory that takes a while to be freed.
MACHINE = """
import fcntl, sys, time
disk = open(sys.argv[1])
fcntl.flock(disk, fcntl.LOCK_EX)
memory = b"x" * (512 << 20)
print("ready", flush=True)
time.sleep(1000)
"""


@contextmanager
def machine(disk: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        ["qemu-stray", "-c", MACHINE, str(disk)],
        executable=sys.executable,
        env={**os.environ, "PYTHONHOME": sys.base_prefix},
        stdout=subprocess.PIPE,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


def test_the_disk_of_a_stray_is_free_at_once(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    with machine(disk) as stray:
        kill_strays(tmp_path)
        with disk.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert stray.wait() == -9


def test_the_one_to_keep_is_kept_and_another_directorys_is_not_touched(tmp_path: Path) -> None:
    ours, others = tmp_path / "a", tmp_path / "ab"
    for directory in (ours, others):
        directory.mkdir()
        (directory / "disk").touch()
    with machine(ours / "disk") as kept, machine(others / "disk") as foreign:
        kill_strays(ours, keep=kept.pid)
        assert (kept.poll(), foreign.poll()) == (None, None)
        kill_strays(ours)
        assert (kept.wait(), foreign.poll()) == (-9, None)
