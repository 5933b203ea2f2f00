"""Version 2: below which group others can be made, and that nobody else's processes are moved."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_cgroups import FakeKernel, words

from ratoon.errors import HostError
from ratoon.machine.host.cgroups import Cgroups, remove
from ratoon.machine.host.hierarchies import ENGINE, make_room
from ratoon.machine.host.limits import Limits
from ratoon.units import MIB

ALL = ("memory", "cpu", "pids")
#: Beyond what the kernel gives out: killing it harms nobody.
NO_PROCESS = 1 << 30


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    return FakeKernel(tmp_path / "cgroup", monkeypatch)


@pytest.fixture
def child() -> Iterator[int]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process.pid
        process.kill()


def passed_by(group: Path) -> set[str]:
    return words(group / "cgroup.subtree_control")


def test_at_the_top_there_is_room(kernel: FakeKernel) -> None:
    assert make_room(kernel.hierarchy(kernel.top), ALL) == kernel.top
    assert passed_by(kernel.top) == set(ALL)


def test_a_group_of_its_own_is_left_to_its_children(kernel: FakeKernel, child: int) -> None:
    """As systemd starts a service with Delegate=yes: it is alone, with what it has started."""
    (kernel.top / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    own = kernel.group("ratoon.service", inside=[os.getpid(), child])
    assert make_room(kernel.hierarchy(own), ("memory",)) == own
    assert words(own / "cgroup.procs") == set()
    assert words(own / ENGINE / "cgroup.procs") == {str(os.getpid()), str(child)}
    assert passed_by(own) == {"memory"}
    assert make_room(kernel.hierarchy(own), ("cpu",)) == own  # as those who ask later do
    assert passed_by(own) == {"memory", "cpu"}


def test_an_engine_that_stepped_down_finds_its_place_again(kernel: FakeKernel) -> None:
    (kernel.top / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    service = kernel.group("ratoon.service", passed="memory")
    engine = kernel.group(f"ratoon.service/{ENGINE}", inside=[os.getpid()])
    assert make_room(kernel.hierarchy(engine), ("memory", "cpu")) == service


def test_beside_others_it_is_done_below_the_top(kernel: FakeKernel) -> None:
    """As in a login session: the shell, process 1 here, is not moved."""
    (kernel.top / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    session = kernel.group("session-1.scope", inside=[1, os.getpid()])
    assert make_room(kernel.hierarchy(session), ALL) == kernel.top
    assert not (session / ENGINE).exists()
    assert passed_by(session) == set()


def test_in_a_container_with_others_it_is_refused(kernel: FakeKernel) -> None:
    """The container's top is not the kernel's: it has a type, and processes."""
    (kernel.top / "cgroup.type").write_text("domain\n")
    (kernel.top / "cgroup.procs").write_text(str(os.getpid()))
    with pytest.raises(HostError, match="has processes that are not the engine's; run the engine"):
        make_room(kernel.hierarchy(kernel.top), ALL)
    assert passed_by(kernel.top) == set()


def test_a_controller_that_was_not_handed_down_is_looked_for_above(kernel: FakeKernel) -> None:
    (kernel.top / "cgroup.subtree_control").write_text("+memory +pids")
    own = kernel.group("ratoon.service", inside=[os.getpid()])
    assert make_room(kernel.hierarchy(own), ("cpu",)) == kernel.top
    (kernel.top / "cgroup.controllers").write_text("memory pids")
    with pytest.raises(HostError, match="no cpu limit can be set"):
        make_room(kernel.hierarchy(own), ("cpu",))


def test_what_is_written(kernel: FakeKernel, tmp_path: Path) -> None:
    sandbox = tmp_path / "sb-1"
    sandbox.mkdir()
    limits = Limits(memory_bytes=256 * MIB, cpus=1.5, pids=200)
    cgroup = Cgroups("store", [kernel.hierarchy(kernel.top)]).create(sandbox, limits)
    assert cgroup is not None
    group = kernel.top / "ratoon/store/sb-1"
    assert {
        name: (group / name).read_text()
        for name in ("memory.max", "memory.swap.max", "cpu.max", "pids.max")
    } == {
        "memory.max": str(256 * MIB),
        "memory.swap.max": "0",
        "cpu.max": "150000 100000",
        "pids.max": "200",
    }
    cgroup.add(NO_PROCESS)
    assert words(group / "cgroup.procs") == {str(NO_PROCESS)}
    remove(sandbox)
    assert not (kernel.top / "ratoon").exists()


def test_only_what_is_needed_is_written(kernel: FakeKernel, tmp_path: Path) -> None:
    cgroups = Cgroups("store", [kernel.hierarchy(kernel.top)])
    cgroups.create(tmp_path, Limits(pids=200))
    assert passed_by(kernel.top) == {"pids"}
    assert passed_by(kernel.top / "ratoon/store") == {"pids"}


@pytest.mark.parametrize(
    ("events", "cause"),
    [
        ("low 0\nhigh 0\nmax 9\noom 0\noom_kill 0\n", None),
        ("low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\n", "memory limit of 256.0 MiB"),
        ("low 0\nhigh 0\nmax 0\noom 0\noom_kill 1\n", "the host, or what the engine may use"),
    ],
)
def test_a_death_for_want_of_memory(
    kernel: FakeKernel, tmp_path: Path, events: str, cause: str | None
) -> None:
    cgroups = Cgroups("store", [kernel.hierarchy(kernel.top)])
    cgroup = cgroups.create(tmp_path, Limits(memory_bytes=256 * MIB))
    assert cgroup is not None
    (cgroup.groups[0].directory / "memory.events").write_text(events)
    said = cgroup.cause_of_death()
    assert said is None if cause is None else said is not None and cause in said


def test_a_death_for_want_of_threads(kernel: FakeKernel, tmp_path: Path) -> None:
    cgroup = Cgroups("s", [kernel.hierarchy(kernel.top)]).create(tmp_path, Limits(pids=200))
    assert cgroup is not None
    (cgroup.groups[0].directory / "pids.events").write_text("max 0\n")
    assert cgroup.cause_of_death() is None
    (cgroup.groups[0].directory / "pids.events").write_text("max 3\n")
    assert cgroup.cause_of_death() == "it could not start a thread: 200 are its limit"
