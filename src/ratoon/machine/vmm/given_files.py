"""The files that a QEMU is given open, so that it opens none by a path.

QEMU keeps descriptors in numbered sets, each of one file, and calls a set /dev/fdset/N: what opens
that is given the descriptor with the access it asks for (`add-fd` in QEMU's QMP reference). What
QEMU opens past that layer finds its descriptor as /proc/self/fd/N.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

#: How a layer is opened, and how the disk's writable top: QEMU opens that for reading alone once
#: something lies above it.
READ = (os.O_RDONLY,)
READ_AND_WRITE = (os.O_RDWR, os.O_RDONLY)
APPEND = (os.O_WRONLY | os.O_APPEND | os.O_CREAT,)


class Files(Protocol):
    """How the files on a command line are named, for whoever opens them."""

    def in_set(self, path: Path, ways: tuple[int, ...]) -> str:
        """The name of a file that is opened in these ways (flags of open(2)), through the sets."""

    def inherited(self, path: Path) -> str:
        """The name of a file that is opened for reading, past the sets."""


class ByPath:
    """Files that QEMU opens itself."""

    def in_set(self, path: Path, ways: tuple[int, ...]) -> str:
        return str(path)

    def inherited(self, path: Path) -> str:
        return str(path)


class GivenFiles:
    """Opens the files, and holds them for a process to inherit until the block ends. OSError."""

    def __init__(self) -> None:
        #: What the process must inherit.
        self.descriptors: list[int] = []
        #: What its command line must say of that.
        self.options: list[tuple[str, str]] = []
        self._sets = 0
        self._held = ExitStack()

    def __enter__(self) -> GivenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def in_set(self, path: Path, ways: tuple[int, ...]) -> str:
        """`path` is told to QEMU, which tells it to those who ask what it has; it opens nothing."""
        number, self._sets = self._sets, self._sets + 1
        told = str(path).replace(",", ",,")
        for flags in ways:
            self.options.append(
                ("-add-fd", f"fd={self._open(path, flags)},set={number},opaque={told}")
            )
        return f"/dev/fdset/{number}"

    def inherited(self, path: Path) -> str:
        return f"/proc/self/fd/{self._open(path, os.O_RDONLY)}"

    def _open(self, path: Path, flags: int) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._held.callback(os.close, fd)
        self.descriptors.append(fd)
        return fd
