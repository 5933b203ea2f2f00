"""Control groups that the kernel makes: their limits hold, they say so, and they go again."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ratoon.errors import HostError
from ratoon.machine.host import cgroups as module
from ratoon.machine.host.cgroups import RECORD, Cgroup, Cgroups, find, remove
from ratoon.machine.host.hierarchies import Hierarchy, hierarchies
from ratoon.machine.host.limits import Limits
from ratoon.units import MIB

ALL = Limits(memory_bytes=128 * MIB, cpus=0.05, pids=160)
#: Waits until it has been put where it belongs.
WAIT = "import os, sys, threading, time\nsys.stdin.readline()\n"


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / f"sb-{os.getpid():x}"
    directory.mkdir()
    yield directory
    remove(directory)


@pytest.fixture
def cgroups() -> Cgroups:
    return Cgroups(f"test-{os.getpid()}", hierarchies())


def make(cgroups: Cgroups, sandbox: Path, limits: Limits) -> Cgroup:
    cgroup = cgroups.create(sandbox, limits)
    assert cgroup is not None
    return cgroup


@contextmanager
def running(cgroup: Cgroup, script: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python that does `script` once it is in the group."""
    command = [sys.executable, "-c", WAIT + script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin
        try:
            cgroup.add(process.pid)
            process.stdin.write(b"go\n")
            process.stdin.flush()
            yield process
        finally:
            process.kill()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def throttled(cgroup: Cgroup) -> int:
    (group,) = (group for group in cgroup.groups if "cpu" in group.controllers)
    return group.count("cpu.stat", "nr_throttled")


def test_no_limit_needs_no_group(cgroups: Cgroups, sandbox: Path) -> None:
    assert cgroups.create(sandbox, Limits(disk_bytes=32 * MIB)) is None
    assert not (sandbox / RECORD).exists()


def test_who_takes_too_much_memory_is_killed_and_it_is_said(
    cgroups: Cgroups, sandbox: Path
) -> None:
    cgroup = make(cgroups, sandbox, ALL)
    with running(cgroup, "held = b'x' * (1 << 28)") as process:
        assert process.wait() == -9
    assert cgroup.cause_of_death() == (
        "the kernel killed it at its memory limit of 128.0 MiB; give it a higher one"
    )


def test_who_is_killed_by_somebody_was_not_killed_by_a_limit(
    cgroups: Cgroups, sandbox: Path
) -> None:
    cgroup = make(cgroups, sandbox, ALL)
    with running(cgroup, "time.sleep(1000)") as process:
        process.kill()
    assert cgroup.cause_of_death() is None


def test_who_takes_too_much_processor_time_waits(cgroups: Cgroups, sandbox: Path) -> None:
    cgroup = make(cgroups, sandbox, ALL)
    with running(cgroup, "while True: pass"):
        until(lambda: throttled(cgroup) > 2)


def test_who_starts_too_many_threads_cannot(cgroups: Cgroups, sandbox: Path) -> None:
    cgroup = make(cgroups, sandbox, Limits(pids=160))
    script = (
        "for _ in range(200): threading.Thread(target=threading.Event().wait, daemon=True).start()"
    )
    with running(cgroup, script) as process:
        _, complaint = process.communicate()
        assert b"can't start new thread" in complaint
    assert cgroup.cause_of_death() == "it could not start a thread: 160 are its limit"


def test_one_that_is_gone_need_not_be_added(cgroups: Cgroups, sandbox: Path) -> None:
    cgroup = make(cgroups, sandbox, ALL)
    with subprocess.Popen(["true"]) as process:
        process.wait()
    cgroup.add(process.pid)


def test_they_are_removed_with_what_is_left_in_them(cgroups: Cgroups, sandbox: Path) -> None:
    cgroup = make(cgroups, sandbox, ALL)
    directories = [group.directory for group in cgroup.groups]
    assert find(sandbox, ALL) == cgroup
    with running(cgroup, "time.sleep(1000)") as process:
        remove(sandbox)
        assert process.wait() == -9
    assert not any(each.exists() or each.parent.exists() for each in directories)
    assert not (sandbox / RECORD).exists()
    remove(sandbox)
    assert cgroup.cause_of_death() is None
    assert find(sandbox, ALL) is None


def test_those_of_an_earlier_life_are_replaced(cgroups: Cgroups, sandbox: Path) -> None:
    make(cgroups, sandbox, ALL)
    cgroup = make(cgroups, sandbox, Limits(memory_bytes=256 * MIB))
    (group,) = cgroup.groups
    assert group.directory.exists()
    assert find(sandbox, cgroup.limits) == cgroup


def test_sandboxes_share_the_groups_above(cgroups: Cgroups, tmp_path: Path) -> None:
    one, other = tmp_path / "sb-1", tmp_path / "sb-2"
    for sandbox in (one, other):
        sandbox.mkdir()
    try:
        make(cgroups, one, ALL)
        left = make(cgroups, other, ALL)
        remove(one)
        assert all(group.directory.exists() for group in left.groups)
    finally:
        remove(one)
        remove(other)


def test_one_that_does_not_become_empty_stays(
    cgroups: Cgroups,
    sandbox: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make(cgroups, sandbox, Limits(pids=200))
    monkeypatch.setattr(module, "EMPTY_TIMEOUT", 0)

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", busy)
        record = (sandbox / RECORD).read_text()
        remove(sandbox)
    assert "stays: Device or resource busy" in caplog.text
    (sandbox / RECORD).write_text(record)


def test_a_record_that_names_another_place_is_not_followed(tmp_path: Path) -> None:
    sandbox, other = tmp_path / "sb-1", tmp_path / "other"
    sandbox.mkdir()
    other.mkdir()
    (sandbox / RECORD).write_text(f"1 memory {other}\n")
    remove(sandbox)
    assert other.exists()


def test_without_control_groups_a_limit_is_refused(sandbox: Path) -> None:
    with pytest.raises(HostError, match="no memory limit can be set: no control groups with"):
        Cgroups("store", []).create(sandbox, ALL)
    assert Cgroups("store", []).create(sandbox, Limits()) is None


def test_where_nothing_can_be_written_a_limit_is_refused(sandbox: Path) -> None:
    """/proc takes no directories, not even from root."""
    hierarchy = Hierarchy(1, frozenset({"memory"}), Path("/proc"), Path("/proc/self"))
    with pytest.raises(HostError, match=r"no memory limit can be set: /proc/self/ratoon.*leave"):
        Cgroups("store", [hierarchy]).create(sandbox, Limits(memory_bytes=128 * MIB))
    assert not (sandbox / RECORD).exists()


def test_a_group_that_cannot_be_finished_is_removed(cgroups: Cgroups, sandbox: Path) -> None:
    """Here one of the two hierarchies is writable, the other is not."""
    found = [each for each in hierarchies() if "memory" not in each.controllers]
    found.append(Hierarchy(1, frozenset({"memory"}), Path("/proc"), Path("/proc/self")))
    broken = Cgroups(f"test-{os.getpid()}", found)
    with pytest.raises(HostError, match="no memory limit can be set"):
        broken.create(sandbox, Limits(pids=200, memory_bytes=128 * MIB))
    for each in found:
        assert not (each.own / "ratoon" / f"test-{os.getpid()}").exists()
