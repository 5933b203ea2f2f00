"""Images: the whole RAM of a chain's head in one sparse file, for its forks to map privately.

An image is a cache, named after its memory root: ROOT.ram, and beside it ROOT.json, the stamp of
the file as it was when it had been made from checked pages and flushed. Stamp and file agree, or
the image does not exist and is made again, on a new inode; whoever has mapped the old one keeps it.

ROOT.json was modified when the image was last used: the image's own times are in the stamp. Under a
budget of bytes the least recently used go, at any moment: so a fork opens an image once, and gives
its machine the descriptor, not the name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from ratoon.files import Stamp, fsync_path, locked, naming, try_lock, write_durable
from ratoon.memory.budget import CachedImage, evictable, image_budget
from ratoon.memory.chain import Link, entries_above, resolve
from ratoon.memory.digests import PAGE_SIZE, memory_root
from ratoon.memory.pageset import read_pages, write_at
from ratoon.memory.reflink import can_reflink, share_pages
from ratoon.memory.runs import run_bounds


@dataclass(frozen=True)
class OpenImage:
    """An image held open: it stays, unchanged, even if its name goes. Leaving `with` closes it."""

    path: Path
    #: Open for reading; a process that inherits it can open the file anew, by /proc/self/fd.
    fd: int

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> OpenImage:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ImageStore:
    """The images below one directory, which many processes may share. All methods block."""

    def __init__(self, directory: Path, budget: int | None = None) -> None:
        """`budget`: bytes that the images may take; None for what `image_budget` says."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        #: Where the images are.
        self.directory = directory
        self.budget = image_budget(directory) if budget is None else budget
        #: How often a fork found its image here, and how often not.
        self.hits = self.misses = 0

    @cached_property
    def reflinks(self) -> bool:
        """Whether an image shares the extents of its layers; as the file system can."""
        return can_reflink(self.directory)

    def find(self, root: str, ram_pages: int) -> Path | None:
        """The image of `root`, or None where there is none, or not the one that was stamped.

        It may be evicted at any moment; to use it, `open` it.
        """
        image = self._open(root, ram_pages)
        if image is None:
            return None
        image.close()
        return image.path

    def open(self, root: str, ram_pages: int) -> OpenImage | None:
        """As `find`, for use: the image is held open, and counts as used now."""
        image = self._open(root, ram_pages)
        if image:
            with suppress(FileNotFoundError):  # evicted meanwhile: it is open all the same
                os.utime(self._stamp_file(root))
        return image

    def make(self, links: Sequence[Link], ram_pages: int) -> Path:
        """The image of the head of `links`, made if it is not there; all-zero RAM for no links.

        However many ask at once, one makes it and the others wait; then others are evicted as the
        budget demands. Raises ChainMismatch for layers that do not fit together, Corrupt naming the
        layer and page that are not what their digest says. A failure leaves nothing behind.
        """
        array = resolve(links, ram_pages)
        root = links[-1].root if links else memory_root(array)
        path = self.find(root, ram_pages)
        if path:
            return path
        with locked(self._lock_file(root)):
            path = self.find(root, ram_pages) or self._make(root, links, ram_pages)
        # Also by who only waited: an eviction may have passed over this image while it was locked.
        self._evict(keep=root)
        return path

    def _make(self, root: str, links: Sequence[Link], ram_pages: int) -> Path:
        path = self._image(root)
        temporary = self._temporary(root)
        temporary.unlink(missing_ok=True)  # a crash's
        try:
            with naming(path):
                _write_image(temporary, links, ram_pages, self.reflinks)
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(self.directory)
        # The rename changed the ctime, so the stamp can only be taken now.
        write_durable(self._stamp_file(root), _stamp(root, path.stat()))
        return path

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

    def remove(self, root: str) -> None:
        """Remove the image of `root` if there is one; processes that have mapped it keep it."""
        with locked(self._lock_file(root)):
            self._unlink(root)

    def cached(self) -> tuple[CachedImage, ...]:
        """All images, with what they take and when they were last used; the all-zero one too."""
        found = []
        for path in self.directory.glob("[!.]*.ram"):
            with suppress(FileNotFoundError):  # evicted meanwhile
                allocated = path.stat().st_blocks * 512
                try:
                    used = path.with_suffix(".json").stat().st_mtime_ns
                except FileNotFoundError:  # a crash's: it cannot be used
                    used = 0
                found.append(CachedImage(path.stem, allocated, used))
        return tuple(found)

    def sweep(self) -> None:
        """Remove what a crash left: images half made or without a stamp; those being made stay."""
        for path in (*self.directory.glob(".*.tmp"), *self.directory.glob("[!.]*.*")):
            if not self._is_litter(path):
                continue
            fd = try_lock(self._lock_file(path.name.removeprefix(".")))
            if fd is None:
                continue
            try:
                if self._is_litter(path):  # and was not finished before the lock was ours
                    path.unlink(missing_ok=True)
            finally:
                os.close(fd)

    def _is_litter(self, path: Path) -> bool:
        if path.name.startswith("."):
            return True
        other = {".ram": ".json", ".json": ".ram"}.get(path.suffix)
        return other is not None and not path.with_suffix(other).exists()

    def _open(self, root: str, ram_pages: int) -> OpenImage | None:
        path = self._image(root)
        try:
            stamped = self._stamp_file(root).read_bytes()
            image = OpenImage(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        stat = os.fstat(image.fd)
        if _stamp(root, stat) == stamped and stat.st_size == ram_pages * PAGE_SIZE:
            return image
        image.close()
        return None

    def _evict(self, *, keep: str) -> None:
        """Remove images until the budget holds the others; `keep` and those being made stay."""
        with locked(self.directory / ".evict.lock"):
            images = self.cached()
            excess = sum(image.allocated_bytes for image in images) - self.budget
            for image in evictable(images, keep=keep):
                if excess <= 0:
                    break
                lock = try_lock(self._lock_file(image.root))
                if lock is None:
                    continue
                try:
                    self._unlink(image.root)
                finally:
                    os.close(lock)
                excess -= image.allocated_bytes

    def _unlink(self, root: str) -> None:
        self._stamp_file(root).unlink(missing_ok=True)
        self._image(root).unlink(missing_ok=True)

    def _image(self, root: str) -> Path:
        return self.directory / f"{root}.ram"

    def _stamp_file(self, root: str) -> Path:
        return self.directory / f"{root}.json"

    def _temporary(self, root: str) -> Path:
        return self.directory / f".{root}.ram.tmp"

    def _lock_file(self, root: str) -> Path:
        # To unlink a lock file is a race, so they stay; by the root's first byte, at most 256.
        return self.directory / f".{root[:2]}.lock"


def _stamp(root: str, stat: os.stat_result) -> bytes:
    stamp = Stamp.of_stat(stat, with_ctime=True)
    return json.dumps({"root": root, **asdict(stamp)}, sort_keys=True).encode()


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
