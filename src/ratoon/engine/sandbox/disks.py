"""The disks of chain heads: which files a machine opens for one.

A chain of few layers is opened as it is. Of a deeper one there is a flattened disk, or one of its
beginning, and the layers above that are opened too. It is made in the background, never in the path
of a fork: for the second fork of a head, or for the first that has to open many.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from ratoon.engine.sandbox.background_builds import BackgroundBuilds
from ratoon.errors import NotFound
from ratoon.store.snapshot.flat_disks import Covering, FlatDisks
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store

log = logging.getLogger(__name__)

#: So many files may be opened for a disk before it is flattened for its second fork …
FEW = 3
#: … and so many before it is for the first.
MANY = 6
#: Instead of FEW where there is a flattened disk: that and the base. Any more is of the fork's own
#: twin, and so waits for all of its links, of which a deep chain has many.
HELD = 2


@dataclass(frozen=True)
class HeldDisk:
    """What a machine's disk consists of; what of it could go is held open until `close`."""

    #: How many of the lowest layers are held: the base, and what a flattened disk has.
    covered: int = 0
    #: Of the base and the flattened disk, or none.
    descriptors: tuple[int, ...] = ()

    @classmethod
    def of(cls, source: Snapshot, covering: Covering | None) -> HeldDisk:
        """The disk of `source`; takes over what is open of `covering`."""
        if covering is None:
            return cls()
        try:
            base = os.open(source.disk_path(0), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # whoever verifies the layers says so
            covering.image.close()
            return cls()
        return cls(covering.covered, (base, covering.image.fd))

    def is_whole(self, twin: Snapshot) -> bool:
        """Whether all that is to be opened is held, and nothing of the sandbox's own `twin` is."""
        return self.covered > twin.depth

    def paths(self, twin: Snapshot) -> tuple[Path, ...]:
        """The files to be opened, lowest first; layers are those of the sandbox's own `twin`."""
        held = [Path(f"/proc/self/fd/{fd}") for fd in self.descriptors]
        above = [twin.disk_path(number) for number in range(self.covered, twin.depth + 1)]
        return (*held, *above)

    def close(self) -> None:
        for fd in self.descriptors:
            os.close(fd)


class DiskChooser:
    """Chooses what forks open, and has flattened disks made. `settle` waits for those."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._flats = FlatDisks(store.images)
        self._forked: set[str] = set()
        self._making: BackgroundBuilds[None] = BackgroundBuilds(self._flats.remove)
        self._one_at_a_time = asyncio.Semaphore(1)

    def expect_many(self, source: Snapshot) -> None:
        """The next fork of `source` is not the only one."""
        self._forked.add(source.manifest.disk_root)

    def hold(self, source: Snapshot) -> HeldDisk:
        """What a fork of `source` opens."""
        root = source.manifest.disk_root
        disk = HeldDisk.of(source, self._flats.nearest(source.manifest))
        files = len(disk.paths(source))
        few = HELD if disk.covered else FEW
        if files > (few if root in self._forked else MANY):
            self._making.begin(root, lambda: self._make(source))
        self._forked.add(root)
        return disk

    async def remove(self, *roots: str) -> None:
        """Forget heads, and remove their flattened disks; those that are being made go after."""
        self._forked.difference_update(roots)
        await self._making.remove(*roots)

    async def settle(self) -> None:
        """Wait until no disk is being flattened."""
        await self._making.settle()

    async def _make(self, source: Snapshot) -> None:
        try:
            async with self._one_at_a_time:
                await asyncio.to_thread(self._make_blocking, source)
        except NotFound as error:
            log.info("%s, so its disk was not flattened", error)
        except Exception as error:  # nobody waits for it
            log.warning("the disk of snapshot %s was not flattened: %s", source.manifest.tag, error)

    def _make_blocking(self, source: Snapshot) -> None:
        with self._store.scratch() as room:
            self._flats.make(source, room)
