"""What the host has left: memory, disk, descriptors, and numbers for threads."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ratoon.errors import HostError
from ratoon.machine.host.hierarchies import Hierarchy, with_controller

_PROC = Path("/proc")


@dataclass(frozen=True)
class Figures:
    """What this process and what it starts may still take; totals in bytes where they matter.

    `memory_owner` says whose memory it is: the host's, or a control group's with a limit.
    """

    memory_bytes: int
    memory_total: int
    memory_owner: str
    disk_bytes: int
    disk_total: int
    files: int
    threads: int


def read_figures(directory: Path, hierarchies: Sequence[Hierarchy]) -> Figures:
    """The figures at this moment; the disk is the one of `directory`, which exists."""
    memory, total, owner = min(_memories(hierarchies))
    disk = os.statvfs(directory)
    return Figures(
        memory_bytes=memory,
        memory_total=total,
        memory_owner=owner,
        disk_bytes=disk.f_bavail * disk.f_frsize,
        disk_total=disk.f_blocks * disk.f_frsize,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        - sum(1 for _ in Path("/proc/self/fd").iterdir()),
        threads=min(_threads(hierarchies)),
    )


def file_system(directory: Path, mounts: Path = _PROC / "self/mountinfo") -> str:
    """The kind that a directory is on, as `ext4`; "", where its device is none that is mounted."""
    number = directory.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    for line in mounts.read_text().splitlines():
        if line.split()[2] == device:  # proc_pid_mountinfo(5)
            return line.partition(" - ")[2].split()[0]
    return ""


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (line.split() for line in (_PROC / "meminfo").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) == 3}


def _memories(hierarchies: Sequence[Hierarchy]) -> Iterator[tuple[int, int, str]]:
    """What is available, of how much, and whose: the host's, and each limited group's above."""
    host = meminfo()
    yield host["MemAvailable"], host["MemTotal"], "the host"
    hierarchy = with_controller(hierarchies, "memory")
    for group in _upwards(hierarchy):
        if hierarchy and hierarchy.version == 1:
            limit, usage = group / "memory.limit_in_bytes", group / "memory.usage_in_bytes"
            cached = ("total_active_file", "total_inactive_file")
        else:
            limit, usage = group / "memory.max", group / "memory.current"
            cached = ("active_file", "inactive_file")
        size = _number(limit)
        if size is None or size >= host["MemTotal"]:  # none, or the largest number there is
            continue
        # Page cache is taken back where memory is short.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = size - (_number(usage) or 0) + sum(int(stat[name]) for name in cached)
        yield min(free, size), size, f"the control group {group}"


def _threads(hierarchies: Sequence[Hierarchy]) -> Iterator[int]:
    running = int((_PROC / "loadavg").read_text().split()[3].partition("/")[2])
    for name in ("pid_max", "threads-max"):
        yield int((_PROC / "sys/kernel" / name).read_text()) - running
    for group in _upwards(with_controller(hierarchies, "pids")):
        most = _number(group / "pids.max")
        if most is not None:
            yield most - (_number(group / "pids.current") or 0)


def _upwards(hierarchy: Hierarchy | None) -> Iterator[Path]:
    """This process's group and those above it, as far as they are mounted."""
    if hierarchy is None:
        return
    for group in (hierarchy.own, *hierarchy.own.parents):
        yield group
        if group == hierarchy.top:
            return
    raise HostError(f"{hierarchy.own} is not below {hierarchy.top}")


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file, or it says `max`."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    return None if text == "max" else int(text)
