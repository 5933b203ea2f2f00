"""Admission control: forks for which the host has no room are refused before they start.

A host without memory kills what runs, so what cannot be held must not be begun. Forks that are
being started show in the host's figures only later, and are counted until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from ratoon.errors import Overloaded
from ratoon.machine.host.figures import Figures
from ratoon.units import GIB, MIB, format_size, size_from_env

FORK_MEMORY = "RATOON_FORK_MEMORY"
MEMORY_RESERVE = "RATOON_MEMORY_RESERVE"
DISK_RESERVE = "RATOON_DISK_RESERVE"


@dataclass(frozen=True)
class Cost:
    """What one started fork takes, or may take within its first moments."""

    #: Measured: 22 MiB once its agent has answered, 47 after a shell command.
    memory_bytes: int = 48 * MIB
    #: Measured: 0.2 MiB at first, 0.3 after some commands.
    disk_bytes: int = MIB
    #: Measured: four, and three more while it starts.
    files: int = 7
    #: Measured: six; QEMU starts more while its guest uses the disk.
    threads: int = 8

    @classmethod
    def from_environment(cls) -> Self:
        """As measured; RATOON_FORK_MEMORY is for whom forks do more, or less, at first."""
        memory = size_from_env(FORK_MEMORY)
        return cls() if memory is None else cls(memory_bytes=memory)


@dataclass(frozen=True)
class Reserve:
    """What is kept free in any case, in bytes."""

    memory_bytes: int
    disk_bytes: int

    @classmethod
    def of(cls, figures: Figures) -> Self:
        """RATOON_MEMORY_RESERVE and RATOON_DISK_RESERVE, else a part of what there is.

        Memory: a twentieth, from 128 MiB to 2 GiB. Disk: a hundredth, up to 1 GiB.
        """
        memory, disk = size_from_env(MEMORY_RESERVE), size_from_env(DISK_RESERVE)
        if memory is None:
            memory = min(max(figures.memory_total // 20, 128 * MIB), 2 * GIB)
        if disk is None:
            disk = min(figures.disk_total // 100, GIB)
        return cls(memory, disk)


def shortage(n: int, under_way: int, cost: Cost, figures: Figures, reserve: Reserve) -> str | None:
    """Why there is no room for `n` more forks while `under_way` are being started; None: there is.

    In figures, for the person who asked.
    """
    forks = f"{n} fork{'s' * (n > 1)}"
    if under_way:
        forks += f" and the {under_way} being started"
    all_of_them = n + under_way
    need = "needs" if all_of_them == 1 else "need"

    def lacking(what: str, each: int, free: int, kept: int, owner: str) -> str | None:
        if all_of_them * each <= free - kept:
            return None
        return (
            f"{forks} {need} about {format_size(all_of_them * each)} of {what}; "
            f"{owner} has {format_size(free)} free, of which {format_size(min(kept, free))} "
            "are kept in reserve"
        )

    memory = figures.memory_bytes, reserve.memory_bytes, figures.memory_owner
    if text := lacking("memory", cost.memory_bytes, *memory):
        return text
    if text := lacking(
        "disk", cost.disk_bytes, figures.disk_bytes, reserve.disk_bytes, "the file system"
    ):
        return text
    for each, free, what, way_out in (
        (cost.files, figures.files, "open files", "raise `ulimit -n`"),
        (cost.threads, figures.threads, "threads", "raise kernel.pid_max or pids.max"),
    ):
        if all_of_them * each > free:
            return f"{forks} {need} {all_of_them * each} {what}; {max(free, 0)} are left: {way_out}"
    return None


class Admission:
    """Whether one engine may start more forks; `read` gives the host's figures."""

    def __init__(self, read: Callable[[], Figures]) -> None:
        self._read = read
        self._cost = Cost.from_environment()
        self._under_way = 0

    @contextmanager
    def require_room(self, n: int) -> Iterator[Callable[[], None]]:
        """Count `n` forks as being started for the block; Overloaded if they would not fit.

        What it gives is called once for each that has started, or has failed: from then on the
        host's figures show what it takes.
        """
        figures = self._read()
        reserve = Reserve.of(figures)
        if why := shortage(n, self._under_way, self._cost, figures, reserve):
            raise Overloaded(f"{why}; fork fewer at a time, or kill sandboxes first")
        waiting = n
        self._under_way += n

        def ended() -> None:
            nonlocal waiting
            waiting -= 1
            self._under_way -= 1

        try:
            yield ended
        finally:
            self._under_way -= waiting
