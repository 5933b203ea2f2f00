"""What QEMU and the guest's console wrote: the end of it, and keeping it small.

Whoever writes appends (O_APPEND), so a file may be cut while it is written to.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from ratoon.machine.vmm import command

#: Bytes of each that an error quotes.
TAIL_BYTES = 2000
#: A log that is longer is cut, and keeps this much of its end.
LIMIT_BYTES = 1024 * 1024
KEPT_BYTES = 64 * 1024


def log_tail(log: Path) -> str:
    """The end of what QEMU and the guest's console wrote."""
    parts = []
    for path in (command.console_log(log), log):
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            parts.append(file.read().decode(errors="replace").strip())
    return "\n".join(part for part in parts if part)


def log_since(log: Path, begin: int) -> str:
    """What QEMU wrote from byte `begin` on, the end of it if that is long."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - KEPT_BYTES))
        return file.read().decode(errors="replace")


def bound_logs(log: Path) -> None:
    """Cut QEMU's log and the guest's console, each to its end, where they have grown too long.

    What is written at that very moment may be lost, or stand before what is older.
    """
    for path in (command.console_log(log), log):
        with suppress(FileNotFoundError):
            if path.stat().st_size > LIMIT_BYTES:
                _cut(path)


def _cut(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        end = os.pread(fd, KEPT_BYTES, max(0, size - KEPT_BYTES))
        os.ftruncate(fd, 0)
        os.write(fd, b"[cut here: %d bytes before]\n" % (size - len(end)) + end)
    finally:
        os.close(fd)
