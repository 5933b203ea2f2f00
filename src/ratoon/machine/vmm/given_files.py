"""The files that a QEMU is given open, as there is no path of the host in its cell.

QEMU keeps descriptors in numbered sets, each of one file, and calls a set /dev/fdset/N: what opens
that is given the descriptor with the access it asks for (`add-fd` in QEMU's QMP reference). What
QEMU opens past that layer is mounted in the cell, to be read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from ratoon.jail.cell import GIVEN
from ratoon.syscalls import detached_mount

#: Files that are named by a descriptor of this process lie there.
_DESCRIPTORS = Path("/proc/self/fd")
#: How the disk's writable top is opened: QEMU opens it for reading alone once something lies above.
READ_AND_WRITE = (os.O_RDWR, os.O_RDONLY)
APPEND = (os.O_WRONLY | os.O_APPEND | os.O_CREAT,)
DEVICE = (os.O_RDWR,)


class Files(Protocol):
    """How the files on a command line are named, for whoever opens them."""

    def in_set(self, path: Path, ways: tuple[int, ...]) -> str:
        """The name of a file that is opened in these ways (flags of open(2)), through the sets."""

    def layers(self, paths: Sequence[Path]) -> list[str]:
        """Those of files that others share, opened for reading through the sets."""

    def mounted(self, path: Path, place: str) -> str:
        """That of one which is opened for reading past the sets; `place` is one of PLACES."""


#: Where files may be mounted in a cell, and where it finds nameservers.
MEMORY, KERNEL, INITRAMFS, RESOLVER = "memory", "kernel", "initramfs", "etc/resolv.conf"
PLACES = (MEMORY, KERNEL, INITRAMFS, RESOLVER)


class ByPath:
    """Files that QEMU opens itself."""

    def in_set(self, path: Path, ways: tuple[int, ...]) -> str:
        return str(path)

    def layers(self, paths: Sequence[Path]) -> list[str]:
        return list(map(str, paths))

    def mounted(self, path: Path, place: str) -> str:
        return str(path)


class GivenFiles:
    """Opens the files, and holds them for a process to inherit until the block ends. OSError."""

    def __init__(self) -> None:
        #: What the process must inherit.
        self.descriptors: list[int] = []
        #: What must be mounted for it: descriptors, by place.
        self.mounts: dict[str, int] = {}
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
        return self._set(path, [self._open(path, flags) for flags in ways])

    def layers(self, paths: Sequence[Path]) -> list[str]:
        """Opened on a mount of their own, where nobody can change anything about them."""
        named = [path.absolute() for path in paths if path.parent != _DESCRIPTORS]
        if named:
            with _naming(named[0]):
                common = Path(os.path.commonpath([path.parent for path in named]))
                mount = self._read_only(common)
        names = []
        for path in paths:
            with _naming(path):
                if path.parent == _DESCRIPTORS:
                    found = _DESCRIPTORS / str(self._read_only(path))
                    fd = self._open(found, os.O_RDONLY)
                else:
                    fd = self._open(path.absolute().relative_to(common), os.O_RDONLY, mount)
            names.append(self._set(path, [fd]))
        return names

    def mounted(self, path: Path, place: str) -> str:
        self.mounts[place] = self._open(path, os.O_RDONLY)
        return f"/{place}"

    def _set(self, path: Path, descriptors: list[int]) -> str:
        number, self._sets = self._sets, self._sets + 1
        told = str(path).replace(",", ",,")
        for fd in descriptors:
            self.options.append(("-add-fd", f"fd={fd},set={number},opaque={told}"))
        self.descriptors += descriptors
        return f"/dev/fdset/{number}"

    def _read_only(self, path: Path) -> int:
        mount = detached_mount(self._open(path, os.O_PATH), GIVEN)
        self._held.callback(os.close, mount)
        return mount

    def _open(self, path: Path, flags: int, directory: int | None = None) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600, dir_fd=directory)
        self._held.callback(os.close, fd)
        return fd


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error in the block is about this file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise
