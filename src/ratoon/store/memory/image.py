"""Images of memory: the whole RAM of a chain's head in one sparse file, for its forks to map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from ratoon.files import naming
from ratoon.store.memory.cache import RAM, ImageCache, OpenImage
from ratoon.store.memory.chain import Link, entries_above, resolve
from ratoon.store.memory.digests import memory_root
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import read_pages
from ratoon.store.memory.positioned import write_at
from ratoon.store.memory.ranges import run_bounds
from ratoon.store.memory.reflink import can_reflink, share_pages


class ImageStore(ImageCache):
    """The RAM of chains' heads, each in a file that its forks map. All methods block."""

    def __init__(self, directory: Path, budget: int | None = None) -> None:
        """`budget`: bytes that all images may take; None for what `image_budget` says."""
        super().__init__(directory, RAM, budget)

    @cached_property
    def reflinks(self) -> bool:
        """Whether an image shares the extents of its layers; as the file system can."""
        return can_reflink(self.directory)

    def find(self, root: str, ram_pages: int) -> Path | None:
        """The image of `root`, or None where there is none, or not the one that was stamped.

        It may be evicted at any moment; to use it, `open` it.
        """
        image = self._opened(root, ram_pages)
        if image is None:
            return None
        image.close()
        return image.path

    def open(self, root: str, ram_pages: int) -> OpenImage | None:
        """As `find`, for use: the image is held open, and counts as used now."""
        image = self._opened(root, ram_pages)
        if image:
            self._used(root)
        return image

    def make(self, links: Sequence[Link], ram_pages: int) -> Path:
        """The image of the head of `links`, made if it is not there; all-zero RAM for no links.

        However many ask at once, one makes it and the others wait; then others are evicted as the
        budget demands. Raises ChainMismatch for layers that do not fit together, Corrupt naming the
        layer and page that are not what their digest says. A failure leaves nothing behind.
        """
        array = resolve(links, ram_pages)
        root = links[-1].root if links else memory_root(array)

        def write(temporary: Path) -> None:
            with naming(self._image(root)):
                _write_image(temporary, links, ram_pages, self.reflinks)

        return self._make_once(root, lambda: self.find(root, ram_pages), write)

    def nearest(self, links: Sequence[Link], ram_pages: int) -> tuple[OpenImage, int]:
        """The image of the longest beginning of `links` that has one, and how many links that is.

        Where none has, that is the image of all-zero RAM, made if need be, and 0. Whether that
        beginning gives its root is left to the caller: a false root would select a wrong image.
        """
        for covered in range(len(links), 0, -1):
            image = self.open(links[covered - 1].root, ram_pages)
            if image:
                return image, covered
        zero = self.make((), ram_pages)
        return OpenImage(zero, os.open(zero, os.O_RDONLY | os.O_CLOEXEC)), 0

    def _opened(self, root: str, ram_pages: int) -> OpenImage | None:
        image = self._open(root)
        if image is None or os.fstat(image.fd).st_size == ram_pages * PAGE_SIZE:
            return image
        image.close()
        return None


def _write_image(path: Path, links: Sequence[Link], ram_pages: int, reflinks: bool) -> None:
    """Write the RAM of the head of `links` to a new file: flushed, mode 0444, zeros as holes."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, ram_pages * PAGE_SIZE)
        for link, entries in entries_above(links, 0):
            copied = share_pages(fd, link, entries) if reflinks else entries
            for numbers, pages in read_pages(link.path, link.index, copied, label=link.label):
                for start, end in pairwise(run_bounds(numbers).tolist()):
                    run = pages[start:end].reshape(-1).data
                    write_at(fd, run, int(numbers[start]) * PAGE_SIZE)
        os.fchmod(fd, 0o444)
        os.fsync(fd)
    finally:
        os.close(fd)
