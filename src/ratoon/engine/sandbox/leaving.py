"""The caches of what a sandbox has left: its own states, and what is in the store no more.

An image may be made from the twin of a sandbox, whether it is of itself or of a snapshot that was
deleted meanwhile. So it goes with what the sandbox stood on, unless a snapshot has it.
"""

from __future__ import annotations

import asyncio

from ratoon.engine.sandbox.disks import DiskChooser
from ratoon.engine.sandbox.memory_images import MemoryImages
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store


class Leaving:
    """Removes what was made of what sandboxes have left."""

    def __init__(self, store: Store, memory_images: MemoryImages, disks: DiskChooser) -> None:
        self._store = store
        self._memory_images = memory_images
        self._disks = disks

    async def leave(self, *left: Snapshot, keep: tuple[Snapshot, ...] = ()) -> None:
        """A sandbox stands on `left` no more, but on what it shall `keep`."""
        kept = {each.manifest.id for each in keep}
        for manifest in {each.manifest.id: each.manifest for each in left}.values():
            if manifest.id not in kept:
                gone = await asyncio.to_thread(self._store.unpublished_roots, manifest)
                if gone:
                    for each in keep:
                        gone -= {each.manifest.memory_root, *each.manifest.disk_roots}
                    await self.remove(gone)

    async def remove(self, roots: set[str]) -> None:
        """Remove images of memory and disks; those that are being made go after."""
        await self._memory_images.remove(*roots)
        await self._disks.remove(*roots)
