"""Who may write to a volume: one sandbox at a time, on the whole host.

The lock is on the directory itself, so it is the same for all stores, and it goes with the process
that has it, however that ends.
"""

from __future__ import annotations

from ratoon.errors import Conflict
from ratoon.volumes.export import Export

#: By device and inode: who of this process had a directory last; the lock says if it still has.
_last: dict[tuple[int, int], str] = {}


def hold(export: Export, holder: str) -> None:
    """Have it to write to, until it is closed. Conflict names who has it."""
    try:
        export.lock()
    except BlockingIOError:
        whom = _last.get(export.identity, "a sandbox of another engine")
        raise Conflict(
            f"the volume {export.source} is held by {whom}, which may write to it; have it "
            "read-only (:ro), give other volumes, or end that sandbox first"
        ) from None
    _last[export.identity] = holder
