"""The disks of chain heads: which files a machine opens for one.

A chain of few layers is opened as it is. Of a deeper one there is a flattened disk, or one of its
beginning, and the layers above that are opened too. It is made in the background, never in the path
of a fork: for the second fork of a head, or for the first that has to open many.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

from ratoon.errors import NotFound
from ratoon.snapshot.compact import anonymous_layers
from ratoon.snapshot.flat_disks import Covering, FlatDisks
from ratoon.snapshot.roots import roots_of
from ratoon.snapshot.scratch import scratch
from ratoon.snapshot.snapshot import Snapshot
from ratoon.snapshot.store import Store

log = logging.getLogger(__name__)

#: So many files may be opened for a disk before it is flattened for its second fork …
FEW = 3
#: … and so many before it is for the first.
MANY = 6


@dataclass(frozen=True)
class HeldDisk:
    """What a machine's disk consists of; what of it could go is held open until `close`."""

    covering: Covering | None

    @property
    def covered(self) -> int:
        """How many of the lowest layers need not be opened, but for the base."""
        return self.covering.covered if self.covering else 1

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What the machine's process must inherit."""
        return (self.covering.image.fd,) if self.covering else ()

    def paths(self, twin: Snapshot) -> tuple[Path, ...]:
        """The files to be opened, lowest first; layers are those of the sandbox's own `twin`."""
        flat = [Path(f"/proc/self/fd/{fd}") for fd in self.descriptors]
        above = [twin.disk_path(number) for number in range(self.covered, twin.depth + 1)]
        return (twin.disk_path(0), *flat, *above)

    def close(self) -> None:
        if self.covering:
            self.covering.image.close()


class Disks:
    """Chooses what forks open, and has flattened disks made. `settle` waits for those."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._flats = FlatDisks(store.images)
        self._forked: set[str] = set()
        self._making: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Semaphore(1)

    def hold(self, source: Snapshot, *, burst: bool) -> HeldDisk:
        """What a fork of `source` opens; `burst`: it is one of many."""
        root = source.manifest.disk_root
        disk = HeldDisk(self._flats.nearest(source.manifest))
        files = 1 + len(disk.descriptors) + source.depth + 1 - disk.covered
        again = burst or root in self._forked
        if files > (FEW if again else MANY) and root not in self._making:
            task = asyncio.create_task(self._make(source))
            self._making[root] = task
            task.add_done_callback(lambda _: self._making.pop(root))
        self._forked.add(root)
        return disk

    async def release(self, left: Snapshot | None, now: Snapshot | None) -> None:
        """Remove what was made of a sandbox's own layers, which it has left for those of `now`."""
        if left is None:
            return
        roots = roots_of(left.manifest)
        own = set(roots[len(roots) - anonymous_layers(left.manifest) :])
        own -= set(roots_of(now.manifest)) if now else set()
        self._forked -= own
        if own:
            await asyncio.to_thread(self._flats.remove, *own)

    async def settle(self) -> None:
        """Wait until no disk is being flattened."""
        while self._making:
            await asyncio.gather(*self._making.values(), return_exceptions=True)

    async def _make(self, source: Snapshot) -> None:
        try:
            async with self._one_at_a_time:
                await asyncio.to_thread(self._make_blocking, source)
        except NotFound as error:
            log.info("%s, so its disk was not flattened", error)
        except Exception as error:  # nobody waits for it
            log.warning("the disk of snapshot %s was not flattened: %s", source.manifest.tag, error)

    def _make_blocking(self, source: Snapshot) -> None:
        with scratch(self._store) as room:
            self._flats.make(source, room)
