"""What a running sandbox uses of its host, as the kernel counts for its process and its file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """`memory_bytes`: what it shares with nobody, in memory or in swap; page cache does not count.

    `cpu_seconds`: since its process was started; `disk_bytes`: what its writes take on the disk.
    """

    memory_bytes: int
    cpu_seconds: float
    disk_bytes: int


def usage(pid: int, overlay: Path) -> Usage | None:
    """The figures of process `pid` that writes to `overlay`; None if either is gone.

    Reads three small files: cheap enough to be asked for many sandboxes at once (proc(5)).
    """
    process = Path(f"/proc/{pid}")
    try:
        status = dict(
            line.split(":", 1) for line in (process / "status").read_text().splitlines() if line
        )
        ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
        blocks = overlay.stat().st_blocks
    except (FileNotFoundError, ProcessLookupError):
        return None
    if "RssAnon" not in status:  # a zombie has no memory any more
        return None
    kibibytes = sum(int(status[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    return Usage(kibibytes * 1024, sum(map(int, ticks)) / _TICKS, blocks * 512)
