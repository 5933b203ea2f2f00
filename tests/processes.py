"""What processes there are, and what this one has open."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

#: Seconds after which something has hung.
FOR_EVER = 60


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int | None = None) -> set[int]:
    """Those of all threads of a process, by default this one."""
    tasks = Path(f"/proc/{pid or 'self'}/task")
    while True:
        try:
            found = [(task / "children").read_text() for task in tasks.iterdir()]
        except (FileNotFoundError, ProcessLookupError):  # a thread has ended meanwhile
            if not tasks.exists():
                return set()
            continue
        return {int(each) for text in found for each in text.split()}


def descriptors() -> int:
    """How many this process has."""
    return len([*Path("/proc/self/fd").iterdir()])


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + FOR_EVER
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)
