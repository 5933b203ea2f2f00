"""The memory of chain heads: their digests, and what a fork of one maps.

A head that has an image is forked by mapping it. One that has none is forked from the nearest
ancestor's image, with the newer pages written into the process before the device state is loaded:
that costs what the head adds, not the size of the RAM.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon.engine.sandbox.background_builds import BackgroundBuilds
from ratoon.errors import HostError
from ratoon.store.memory import budget
from ratoon.store.memory.cache import OpenImage
from ratoon.store.memory.chain import Link, count_above, pages_above, resolve
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.process import find_mapping, write_pages
from ratoon.store.snapshot.links import ram_pages, read_links
from ratoon.store.snapshot.snapshot import Snapshot

log = logging.getLogger(__name__)

#: A first fork writes at most this much into the process; above it, the image is made first.
PATCH_LIMIT = 64 * 1024 * 1024
#: Bytes of digest arrays kept for the heads used last.
ARRAY_CACHE = 256 * 1024 * 1024
#: How often an image is made that others evict before it can be opened.
ATTEMPTS = 5

Pages = tuple[NDArray[np.uint64], NDArray[np.uint8]]


@dataclass(frozen=True)
class MappedMemory:
    """The file that a machine maps, by name and by identity, and its length in bytes."""

    path: Path
    device: int
    inode: int
    length: int

    @classmethod
    def of(cls, path: Path) -> MappedMemory:
        return cls._of(path, path.stat())

    @classmethod
    def of_image(cls, image: OpenImage) -> MappedMemory:
        """As `of`, whatever its name names by now."""
        return cls._of(image.path, os.fstat(image.fd))

    @classmethod
    def _of(cls, path: Path, st: os.stat_result) -> MappedMemory:
        return cls(path, st.st_dev, st.st_ino, st.st_size)

    def address_in(self, pid: int) -> int:
        """Where process `pid` has it mapped."""
        return find_mapping(pid, self.device, self.inode, self.length).start


@dataclass(frozen=True)
class Patch:
    """What a fork needs besides the image it maps: the layers above the first `covered` ones."""

    links: Sequence[Link]
    covered: int
    ram_pages: int


class MemoryImages:
    """Images and digest arrays of chain heads. `settle` waits for images being made."""

    def __init__(self, images: ImageStore) -> None:
        self._images = images
        self._arrays: OrderedDict[str, NDArray[np.uint8]] = OrderedDict()
        self._forked: set[str] = set()
        self._making: BackgroundBuilds[Path] = BackgroundBuilds(images.remove)

    async def settle(self) -> None:
        """Wait until no image is being made in the background."""
        await self._making.settle()

    def remember(self, root: str, array: NDArray[np.uint8]) -> None:
        """Keep the digest array of `root`, of which it is proven that it gives that root."""
        self._arrays[root] = array
        self._arrays.move_to_end(root)
        while sum(a.nbytes for a in self._arrays.values()) > ARRAY_CACHE and len(self._arrays) > 1:
            self._arrays.popitem(last=False)

    def forget(self, root: str) -> None:
        """Treat `root` as a head that this process has never seen."""
        self._arrays.pop(root, None)
        self._forked.discard(root)

    async def remove(self, *roots: str) -> None:
        """Forget heads, and remove their images; those that are being made go after."""
        for root in roots:
            self.forget(root)
        await self._making.remove(*roots)

    def array(self, snapshot: Snapshot) -> NDArray[np.uint8]:
        """The digest array of a snapshot's memory; blocks. ChainMismatch, Corrupt."""
        root = snapshot.manifest.memory_root
        if root not in self._arrays:
            return self._proven(read_links(snapshot), ram_pages(snapshot))
        self._arrays.move_to_end(root)
        return self._arrays[root]

    def _proven(self, links: Sequence[Link], ram_pages: int) -> NDArray[np.uint8]:
        root = links[-1].root
        if root not in self._arrays:
            self.remember(root, resolve(links, ram_pages))
        return self._arrays[root]

    def open(self, snapshot: Snapshot) -> OpenImage | None:
        """The image of a head, to be closed, if it has one; none of its own files is touched."""
        image = self._images.open(snapshot.manifest.memory_root, ram_pages(snapshot))
        self._images.hits += image is not None
        return image

    async def choose(self, twin: Snapshot, published: Snapshot) -> tuple[OpenImage, Patch | None]:
        """What a fork maps, to be closed, and what is to be written into it besides, if anything.

        The patch is read from the sandbox's own `twin` of the snapshot. An image outlives the
        sandbox, so it is made from what is `published`: in the background for the second fork of a
        head, at once where the patch were too large.
        """
        root = twin.manifest.memory_root
        pages = ram_pages(twin)
        if image := self.open(twin):
            return image, None
        self._images.misses += 1
        links = await asyncio.to_thread(read_links, twin)
        image, covered = self._images.nearest(links, pages)
        if count_above(links, covered) * PAGE_SIZE > PATCH_LIMIT:
            image.close()
            return await self._made_and_opened(published), None
        if root in self._forked:
            self._make(published)
        self._forked.add(root)
        return image, Patch(links, covered, pages)

    async def _made_and_opened(self, snapshot: Snapshot) -> OpenImage:
        for _ in range(ATTEMPTS):
            await self.make_image(snapshot)
            image = self._images.open(snapshot.manifest.memory_root, ram_pages(snapshot))
            if image:
                return image
        raise self.evicted(snapshot)

    def evicted(self, snapshot: Snapshot) -> HostError:
        """What to say where an image does not last until a fork has it."""
        return HostError(
            f"the image of snapshot {snapshot.manifest.tag} is evicted as soon as it is made: "
            f"raise {budget.VARIABLE}, it is {self._images.budget} bytes"
        )

    async def make_image(self, snapshot: Snapshot) -> Path:
        """The image of a published snapshot, made now unless it is there; Corrupt, NotFound."""
        if found := self._images.find(snapshot.manifest.memory_root, ram_pages(snapshot)):
            return found
        return await asyncio.shield(self._make(snapshot))

    def _make(self, snapshot: Snapshot) -> asyncio.Task[Path]:
        async def make() -> Path:
            try:
                return await asyncio.to_thread(self._make_blocking, snapshot)
            except Exception as error:  # nobody may be waiting for it
                log.warning("the image of memory root %s was not made: %s", root, error)
                raise

        root = snapshot.manifest.memory_root
        return self._making.begin(root, make)

    def _make_blocking(self, snapshot: Snapshot) -> Path:
        with snapshot.noticing_deletion():
            return self._images.make(read_links(snapshot), ram_pages(snapshot))

    def read_patch(self, patch: Patch) -> list[Pages]:
        """The pages of a patch, each checked against its digest; blocks.

        ChainMismatch unless the image that is patched, and the result, have the roots they should.
        """
        if patch.covered:
            self._proven(patch.links[: patch.covered], patch.ram_pages)
        self._proven(patch.links, patch.ram_pages)
        return list(pages_above(patch.links, patch.covered))


def write_patch(pid: int, memory: MappedMemory, pages: list[Pages]) -> None:
    """Write pages into a machine that waits for its device state; blocks."""
    start = memory.address_in(pid)
    for numbers, content in pages:
        write_pages(pid, start, numbers, content)
