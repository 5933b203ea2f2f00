"""What processes there are."""

from __future__ import annotations

from pathlib import Path


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
