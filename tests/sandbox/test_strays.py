"""Machines that nobody looks after are killed, and gone when that returns."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ratoon.engine.sandbox.sweep import kill_strays
from ratoon.jail.cell import Cell, Inmate
from ratoon.jail.inmates import name_for
from ratoon.jail.tree import tree

BUSYBOX = Path("/usr/bin/busybox")

#: Like one of an older Ratoon. It holds a lock on its disk, and memory that is freed slowly.
MACHINE = """
import fcntl, sys, time
disk = open(sys.argv[1])
fcntl.flock(disk, fcntl.LOCK_EX)
memory = b"x" * (512 << 20)
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    with Cell(tree([BUSYBOX], {})) as cell:
        yield cell


@contextmanager
def broken_machine(cell: Cell, disk: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that holds a lock on its disk, and whose command line says nothing of that."""
    with disk.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        words = [str(BUSYBOX), "sleep", "1000"]
        name = name_for(disk.parent)
        process = cell.start(Inmate(words, file.fileno(), descriptors=[file.fileno()], name=name))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make cells")
def test_one_is_known_by_what_it_cannot_change(tmp_path: Path, cell: Cell) -> None:
    ours, others = tmp_path / "a", tmp_path / "ab"
    for directory in (ours, others):
        directory.mkdir()
        (directory / "disk").touch()
    mine, theirs = (broken_machine(cell, each / "disk") for each in (ours, others))
    with mine as kept, theirs as foreign:
        kill_strays(ours, keep=kept.pid)
        assert (kept.poll(), foreign.poll()) == (None, None)
        kill_strays(ours)
        with (ours / "disk").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert (kept.wait(), foreign.poll()) == (-9, None)
    kill_strays(ours)
