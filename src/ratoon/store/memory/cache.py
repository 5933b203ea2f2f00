"""The directory of images: files that can be made again, each named after its root, with a stamp.

Two kinds lie there side by side: ROOT.ram, the RAM of a head, and ROOT.qcow2, the layers of its
disk as one. Beside each is ROOT.json, the stamp of the file as it was when it had been made from
what was checked, and flushed. Stamp and file agree, or the image does not exist and is made again,
on a new inode; whoever has the old one open keeps it.

ROOT.json was modified when the image was last used: the image's own times are in the stamp. Under a
budget of bytes the least recently used go, at any moment: so a fork opens an image once, and gives
its machine the descriptor, not the name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ratoon.files import (
    Stamp,
    fsync_path,
    locked,
    removed_on_error,
    try_lock,
    write_durable,
)
from ratoon.store.memory.budget import CachedImage, evictable, image_budget

#: How the names of images end, by their kind.
RAM, DISK = ".ram", ".qcow2"
KINDS = (RAM, DISK)


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

    def __exit__(self, *_: object) -> None:
        self.close()


class ImageCache:
    """The images of one kind in one directory, which many processes may share; the budget, what is
    listed and what is removed are all kinds'. All methods block.
    """

    def __init__(self, directory: Path, kind: str, budget: int | None = None) -> None:
        """`budget`: bytes that the images may take; None for what `image_budget` says."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        #: Where the images are.
        self.directory = directory
        self.budget = image_budget(directory) if budget is None else budget
        #: How often a fork found its image here, and how often not.
        self.hits = self.misses = 0
        self._kind = kind

    def remove(self, *roots: str) -> None:
        """Remove the images of `roots` that there are; processes that have one open keep it."""
        for root in roots:
            with locked(self._lock_file(root)):
                self._unlink(root)

    def cached(self) -> tuple[CachedImage, ...]:
        """All images, with what they take and when they were last used; the all-zero one too."""
        found = []
        for path in self.directory.glob("[!.]*"):
            if path.suffix not in KINDS:
                continue
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
            if not is_litter(path):
                continue
            fd = try_lock(self._lock_file(path.name.removeprefix(".")))
            if fd is None:
                continue
            try:
                if is_litter(path):  # and was not finished before the lock was ours
                    path.unlink(missing_ok=True)
            finally:
                os.close(fd)

    def _open(self, root: str) -> OpenImage | None:
        """The image of `root`, or None where there is none, or not the one that was stamped."""
        path = self._image(root)
        try:
            stamped = self._stamp_file(root).read_bytes()
            image = OpenImage(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        if _stamp(root, os.fstat(image.fd)) == stamped.partition(b"\n")[0]:
            return image
        image.close()
        return None

    def _used(self, root: str) -> None:
        with suppress(FileNotFoundError):  # evicted meanwhile: it is open all the same
            os.utime(self._stamp_file(root))

    def _make_once(
        self, root: str, find: Callable[[], Path | None], write: Callable[[Path], str | None]
    ) -> Path:
        """The image of `root`, as `find` finds it, else made by `write` at the path it is given.

        However many ask at once, one makes it and the others wait; then others are evicted as the
        budget demands. What `write` returns is kept beside the stamp. A failure leaves nothing.
        """
        path = find()
        if path:
            return path
        with locked(self._lock_file(root)):
            path = find() or self._make(root, write)
        # Also by who only waited: an eviction may have passed over this image while it was locked.
        self._evict(keep=root)
        return path

    def _make(self, root: str, write: Callable[[Path], str | None]) -> Path:
        path = self._image(root)
        temporary = self.directory / f".{path.name}.tmp"
        temporary.unlink(missing_ok=True)  # a crash's
        with removed_on_error(temporary):
            known = write(temporary)
            temporary.rename(path)
        fsync_path(self.directory)
        # The rename changed the ctime, so the stamp can only be taken now.
        stamp = _stamp(root, path.stat())
        write_durable(
            self._stamp_file(root), b"\n".join([stamp, *([known.encode()] if known else [])])
        )
        return path

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
        for kind in KINDS:
            (self.directory / f"{root}{kind}").unlink(missing_ok=True)

    def _image(self, root: str) -> Path:
        return self.directory / f"{root}{self._kind}"

    def _stamp_file(self, root: str) -> Path:
        return self.directory / f"{root}.json"

    def _lock_file(self, root: str) -> Path:
        # To unlink a lock file is a race, so they stay; by the root's first byte, at most 256.
        return self.directory / f".{root[:2]}.lock"


def is_litter(path: Path) -> bool:
    """Whether `path`, in the directory of images, is one that is half made, or only half there."""
    if path.name.startswith("."):
        return True
    if path.suffix == ".json":
        return not any(path.with_suffix(kind).exists() for kind in KINDS)
    return path.suffix in KINDS and not path.with_suffix(".json").exists()


def _stamp(root: str, stat: os.stat_result) -> bytes:
    stamp = Stamp.of_stat(stat, with_ctime=True)
    return json.dumps({"root": root, **asdict(stamp)}, sort_keys=True).encode()
