"""Who may write to a volume: one sandbox at a time, on the whole host.

The lock is on the directory itself, so it is the same for all stores, and it goes with the process
that has it, however that ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratoon.errors import Conflict
from ratoon.machine.volumes.export import Export

#: By device and inode: who of this process had a directory last; the lock says if it still has.
_last: dict[tuple[int, int], str] = {}


def hold(export: Export, holder: str) -> None:
    """Have it to write to, until it is closed. Conflict names who has it."""
    try:
        export.lock()
    except BlockingIOError:
        raise _held(export.source, export.identity) from None
    _last[export.identity] = holder


@contextmanager
def only_ours(path: Path) -> Iterator[None]:
    """In the block no sandbox may write to the directory. Conflict names the one that does."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(path, (found.st_dev, found.st_ino)) from None
        yield
    finally:
        os.close(fd)


def _held(path: Path, identity: tuple[int, int]) -> Conflict:
    whom = _last.get(identity, "a sandbox of another engine")
    return Conflict(
        f"the volume {path} is held by {whom}, which may write to it; have it read-only (:ro), "
        "give other volumes, or end that sandbox first"
    )
