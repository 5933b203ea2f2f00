"""The kernel's modules lie in the initramfs, and are mounted in the sandbox's root.

Who asks for one may be the kernel: it runs, in that root, the `modprobe` that is beside them.
"""

from __future__ import annotations

import os

from . import libc
from .bound import ROOM
from .loop import report

#: Where they are in the initramfs, and where everybody looks for them in the sandbox's root.
PLACE = f"/lib/modules/{os.uname().release}"
#: A link leads there: with a mount of our own below /usr, users could bind no /usr in namespaces of
#: theirs (EINVAL, for what is mounted below it is not to be uncovered).
MOUNTED = f"{ROOM}/modules"


class Modules:
    """Made before the agent enters the sandbox's root."""

    def __init__(self) -> None:
        self._directory: int | None = None
        try:
            self._directory = os.open(PLACE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # the kernel is another one than they are of
            pass

    def move_in(self) -> None:
        """In the sandbox's root, where ROOM is. Where the image has modules itself, those count."""
        if self._directory is None:
            return
        try:
            os.mkdir(MOUNTED)
            libc.bind(f"/proc/self/fd/{self._directory}", MOUNTED)
            with open("/proc/sys/kernel/modprobe", "w") as file:
                file.write(f"{MOUNTED}/modprobe")
            os.makedirs(os.path.dirname(PLACE), exist_ok=True)
            os.symlink(MOUNTED, PLACE)
        except OSError as error:
            report(error)
