"""Files in memory, bound over those of the sandbox's /etc that say what each fork has for itself.

So what changes with a fork costs it a small write, and nothing on its disk. As with those of
Docker, users may write to them, but not put another file in their place (EBUSY).
"""

from __future__ import annotations

import os
import stat

from . import libc
from .loop import report

#: Where they are besides, in memory.
ROOM = "/run/ratoon"


def make_room() -> None:
    """In the sandbox's root: have ROOM, which is empty, and nothing of the disk."""
    os.makedirs(ROOM, exist_ok=True)
    flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
    libc.mount(b"tmpfs", ROOM, b"tmpfs", flags, b"mode=755,size=1m")


class BoundFile:
    """One of them, with what the sandbox has there. It is held open, out of the sandbox's reach."""

    def __init__(self, path: str) -> None:
        """In the sandbox's root. Where nothing can be bound, programs find what they did before."""
        name = f"{ROOM}/{os.path.basename(path)}"
        self._fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        os.fchmod(self._fd, 0o644)
        self._size = 0
        #: What `begin_with` has put there, and whether it stands where it was put.
        self._beginning = b""
        self._stands = True
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            before = _file_at(path)
            libc.bind(name, path)
        except OSError as error:
            report(error)
        else:
            self.become(before)

    @property
    def content(self) -> bytes:
        return os.pread(self._fd, os.fstat(self._fd).st_size, 0)

    def look(self) -> None:
        """See what users have made of it, so that the next change need not."""
        self._size = os.fstat(self._fd).st_size
        self._stands = os.pread(self._fd, len(self._beginning), 0) == self._beginning

    def become(self, content: bytes) -> None:
        """Have this and nothing else; `look` was the last thing that happened to it."""
        os.pwrite(self._fd, content, 0)
        if self._size != len(content):
            os.ftruncate(self._fd, len(content))
            self._size = len(content)

    def begin_with(self, beginning: bytes) -> None:
        """As `become`, but what is there stays, after this in place of the beginning before."""
        if self._stands and len(beginning) == len(self._beginning):
            os.pwrite(self._fd, beginning, 0)
        else:
            self.become(beginning + self.content.replace(self._beginning, b"", 1))
        self._beginning, self._stands = beginning, True


def _file_at(path: str) -> bytes:
    """What is in the file at `path`, through links; where there is none, an empty one is made."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                return file.read()
        os.unlink(path)
    except FileNotFoundError:  # a link may be there that leads nowhere
        if os.path.islink(path):
            os.unlink(path)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    return b""
