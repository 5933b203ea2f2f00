"""The host's nameservers, as QEMU finds them: in a file of ours that follows the host's.

QEMU's network reads resolv.conf, and again when that has changed. In its cell one file is mounted
for good, while the host's is mostly replaced by another when it changes.
"""

from __future__ import annotations

import asyncio
import os
from ipaddress import IPv4Address
from pathlib import Path

from ratoon.machine.network.nameserver import (
    INTERVAL,
    RESOLV_CONF,
    first_resolver,
    is_out_of_reach,
)


class Resolver:
    """A file with what the host's resolv.conf says; it is written in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stand_in: IPv4Address | None = None
        self._following: asyncio.Task[None] | None = None

    def follow(self, stand_in: IPv4Address | None) -> None:
        """Be like the host's from now on, until `close`. OSError: the file cannot be written.

        `stand_in`: who is asked in place of a nameserver that is out of reach.
        """
        self._stand_in = stand_in
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._update()
        if self._following is None:
            self._following = asyncio.create_task(self._follow())

    async def close(self, *, keep: bool) -> None:
        """Follow no more; the file goes, unless machines `keep` it mounted that live on."""
        following, self._following = self._following, None
        if following:
            following.cancel()
            await asyncio.wait({following})
        if following and not keep:
            self.path.unlink(missing_ok=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            self._update()

    def _update(self) -> None:
        try:
            wanted = RESOLV_CONF.read_bytes()
        except OSError:  # it is being replaced, or there is none
            wanted = b""
        if self._stand_in:
            first = first_resolver(wanted.decode(errors="replace"))
            if first and is_out_of_reach(first):
                wanted = f"nameserver {self._stand_in}\n".encode() + wanted
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if os.pread(fd, len(wanted) + 1, 0) != wanted:
                os.pwrite(fd, wanted, 0)
                os.truncate(fd, len(wanted))
        finally:
            os.close(fd)
