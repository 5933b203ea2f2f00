"""The main command can be process 1 of its own processes, as in a container.

It has a namespace of pids, and one of mounts for a /proc of that. Commands that are started later
are in both, as those of `docker exec` are; when it ends, the kernel ends them all.
"""

from __future__ import annotations

import errno
import os

from . import libc
from .spawn import StartError
from .stream import Refusal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .spawn import Started

#: What tells programs that they are in a container (systemd.io/CONTAINER_INTERFACE).
CONTAINER = {"container": "ratoon"}
PF_EXITING = 0x00000004  # include/linux/sched.h


class Namespaces:
    """Those of the main command, while it runs."""

    def __init__(self) -> None:
        """Before the agent enters the sandbox's root, where /proc is out of reach."""
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._own = self._open("mnt"), self._open("pid")
        self._main: tuple[int, int] | None = None
        self._pid = 0

    def begin(self, start: Callable[[], Started]) -> Started:
        """Start the main command, in new ones; before it is executed, it calls `mount_proc`.

        /run is a mount there, as on any server: systemd would put an empty one over what it has.
        """
        if self._main is not None:
            raise Refusal("the sandbox has a main command, which has not ended", "taken")
        libc.share_mounts()  # so that volumes that are mounted later are seen there as well
        libc.unshare(libc.CLONE_NEWNS | libc.CLONE_NEWPID)
        try:
            libc.follow_mounts()
            libc.bind_all("/run", "/run")
            started = start()
            self._main = self._open("mnt"), self._open("pid_for_children")
            self._pid = started.pid
        finally:
            _enter(self._own)
        return started

    def beside(self, start: Callable[[], Started]) -> Started:
        """Start a command where the main one is. Where that ends just now, it takes no other."""
        if self._main is None:
            return start()
        _enter(self._main)
        try:
            return start()
        except StartError as error:
            if error.errno != errno.ENOMEM or not self._is_ending():
                raise
        finally:
            _enter(self._own)
        return start()

    def end(self) -> None:
        """The main command has ended, and so has everything in its namespaces."""
        assert self._main is not None
        for fd in self._main:
            os.close(fd)
        self._main = None

    def _is_ending(self) -> bool:
        stat = os.open(f"{self._pid}/stat", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
        try:
            return bool(int(os.read(stat, 4096).rpartition(b")")[2].split()[6]) & PF_EXITING)
        finally:
            os.close(stat)

    def _open(self, kind: str) -> int:
        return os.open(f"self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)


def mount_proc() -> None:
    """In the child that is to be process 1."""
    flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
    libc.mount(b"proc", "/proc", b"proc", flags, None)


def _enter(namespaces: tuple[int, int]) -> None:
    mounts, pids = namespaces
    libc.enter_namespace(mounts, libc.CLONE_NEWNS)
    libc.enter_namespace(pids, libc.CLONE_NEWPID)
