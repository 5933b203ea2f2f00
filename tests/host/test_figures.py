"""What the host has left, also where the engine itself is limited."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ratoon.errors import HostError, Overloaded
from ratoon.machine.host.admission import Admission
from ratoon.machine.host.cgroups import Cgroups, remove
from ratoon.machine.host.figures import Figures, file_system, meminfo, read_figures
from ratoon.machine.host.hierarchies import Hierarchy, hierarchies
from ratoon.machine.host.limits import Limits
from ratoon.units import MIB


def test_this_host(tmp_path: Path) -> None:
    found = read_figures(tmp_path, hierarchies())
    assert 0 < found.memory_bytes <= found.memory_total
    assert 0 < found.disk_bytes <= found.disk_total
    assert found.threads > 0
    assert 0 < found.files < resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_an_open_file_counts(tmp_path: Path) -> None:
    before = read_figures(tmp_path, []).files
    with (tmp_path / "file").open("w"):
        assert read_figures(tmp_path, []).files == before - 1


def limited(top: Path, version: int, *, own: str = "engine") -> Hierarchy:
    """Groups in which 1000 MiB of 3000 are used, 400 of them page cache; the top has no limit."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_", str((1 << 63) - 4096)),
        2: ("memory.max", "memory.current", "", "max"),
    }
    limit, usage, prefix, unlimited = names[version]
    for group, size in ((top, unlimited), (top / "slice", str(3000 * MIB)), (top / own, unlimited)):
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(f"{size}\n")
        (group / usage).write_text(f"{1000 * MIB}\n")
        cached = 200 * MIB
        stat = f"anon 1\n{prefix}active_file {cached}\n{prefix}inactive_file {cached}\n"
        (group / "memory.stat").write_text(stat)
    (top / "cgroup.controllers").write_text("memory pids\n")
    return Hierarchy(version, frozenset({"memory"} if version == 1 else {}), top, top / own)


@pytest.mark.parametrize("version", [1, 2])
def test_the_narrowest_of_the_groups_above_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    hierarchy = limited(tmp_path, version, own="slice/engine")
    monkeypatch.setattr(
        "ratoon.machine.host.figures.meminfo",
        lambda: {"MemAvailable": 8000 * MIB, "MemTotal": 16000 * MIB},
    )
    found = read_figures(tmp_path, [hierarchy])
    assert found.memory_bytes == (3000 - 1000 + 400) * MIB
    assert found.memory_total == 3000 * MIB
    assert found.memory_owner == f"the control group {tmp_path / 'slice'}"


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_does_not_have_more_than_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    hierarchy = limited(tmp_path, version, own="slice/engine")
    monkeypatch.setattr(
        "ratoon.machine.host.figures.meminfo",
        lambda: {"MemAvailable": 99 * MIB, "MemTotal": 9000 * MIB},
    )
    found = read_figures(tmp_path, [hierarchy])
    assert (found.memory_bytes, found.memory_owner) == (99 * MIB, "the host")


def test_threads_are_counted_in_the_groups_above_too(tmp_path: Path) -> None:
    hierarchy = limited(tmp_path, 2)
    (tmp_path / "engine/pids.max").write_text("max\n")
    (tmp_path / "pids.max").write_text("70\n")
    (tmp_path / "pids.current").write_text("50\n")
    assert read_figures(tmp_path, [hierarchy]).threads == 20


def test_a_group_that_is_not_below_its_top_is_an_error(tmp_path: Path) -> None:
    lost = Hierarchy(1, frozenset({"memory"}), tmp_path / "top", tmp_path / "other")
    with pytest.raises(HostError, match="is not below"):
        read_figures(tmp_path, [lost])


def test_the_kind_of_a_file_system(tmp_path: Path) -> None:
    """That of a path's device; of btrfs, subvolumes have numbers that are nowhere else."""
    assert file_system(Path("/proc")) == "proc"
    device = tmp_path.stat().st_dev
    (tmp_path / "mounts").write_text(
        "22 1 0:9999 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        f"23 22 {os.major(device)}:{os.minor(device)} / /home rw - nfs4 server:/home rw,vers=4.2\n"
    )
    assert file_system(tmp_path, tmp_path / "mounts") == "nfs4"
    assert file_system(Path("/proc"), tmp_path / "mounts") == ""


def test_meminfo_is_in_bytes() -> None:
    found = meminfo()
    page = resource.getpagesize()
    assert found["MemTotal"] % page == 0
    assert found["MemTotal"] == os.sysconf("SC_PHYS_PAGES") * page


# With the kernel ------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / f"engine-{os.getpid()}"
    place.mkdir()
    yield place
    remove(place)


SCRIPT = """
import sys
from pathlib import Path
from ratoon.errors import Overloaded
from ratoon.machine.host.admission import Admission
from ratoon.machine.host.figures import read_figures
from ratoon.machine.host.hierarchies import hierarchies

sys.stdin.readline()
found = hierarchies()
admission = Admission(lambda: read_figures(Path("/tmp"), found))
with admission.require_room(2):
    print("two fit")
try:
    with admission.require_room(20):
        print("twenty fit")
except Overloaded as error:
    print(error)
"""


def test_an_engine_with_little_memory_refuses_what_does_not_fit(place: Path) -> None:
    """In a control group of 512 MiB there is room for two forks, not for twenty."""
    groups = Cgroups(place.name, hierarchies()).create(place, Limits(memory_bytes=512 * MIB))
    assert groups is not None
    (group,) = groups.groups
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as engine:
        groups.add(engine.pid)
        said, _ = engine.communicate("go\n")
    two, twenty = said.splitlines()
    assert two == "two fit"
    assert twenty.startswith("20 forks need about 960 MiB of memory; ")
    assert f"the control group {group.directory} has " in twenty


def test_figures_that_shrink(place: Path) -> None:
    """Forks are admitted as long as there is room, and again when there is."""
    now = Figures(1 << 34, 1 << 34, "the host", 1 << 40, 1 << 40, 1000, 1000)
    few = Figures(1 << 28, 1 << 34, "the host", 1 << 40, 1 << 40, 1000, 1000)
    figures = [now, few, now]
    admission = Admission(lambda: figures.pop(0))
    with admission.require_room(3):
        with pytest.raises(Overloaded), admission.require_room(1):
            pass
        with admission.require_room(1):
            pass
