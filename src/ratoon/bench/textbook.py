"""The textbook way to fork a chain of diff snapshots, to compare with. Nothing else uses it.

A reference implementation of what runtimes of this kind do, made as quick as that goes. A snapshot
is a sparse file as large as the RAM, which has the pages that were captured and holes elsewhere,
and the SHA-256 of its parent's whole file. To fork a head, every parent is hashed and compared, the
base is copied, and each link's pages are copied over it; the result is mapped, as images are.

Holes are neither read nor copied, but hashed as the zeros that they stand for: that is what the
digest is of. Data is copied inside the kernel (`copy_file_range`).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path

from ratoon.bench.samples import milliseconds
from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import Corrupt
from ratoon.store.memory.cache import OpenImage
from ratoon.store.memory.chain import Link
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import read_pages
from ratoon.store.memory.ranges import run_bounds

#: What is read and hashed at a time; it stays in the processor's cache.
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)


@dataclass(frozen=True)
class _File:
    """One snapshot: its file, and what its parent's file must hash to."""

    path: Path
    parent_sha256: str | None


@dataclass(frozen=True)
class Assembled:
    """How long it took to make the memory of a head, in ms."""

    hash_ms: float
    copy_ms: float
    overlay_ms: float


class OwnImage(OpenImage):
    """One that a single fork maps: its name goes as it is closed, and it with that fork."""

    def close(self) -> None:
        self.path.unlink()
        super().close()


class Textbook:
    """Chains in the textbook's format, in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._links: dict[str, _File] = {}
        self._chains: dict[str, tuple[str, ...]] = {}
        self._numbers = count()
        #: What the last fork took to assemble.
        self.last: Assembled | None = None

    def write(self, chain: Sequence[Link], ram_pages: int) -> None:
        """Write a chain, base first, as far as it is not there; blocks.

        What has the same memory as one that is there, such as that one compacted, is that one.
        """
        if chain[-1].root in self._chains:
            return
        below: str | None = None
        for link in chain:
            if link.root not in self._links:
                path = self.directory / link.root
                with path.open("xb") as file:
                    file.truncate(ram_pages * PAGE_SIZE)
                    for numbers, pages in read_pages(link.path, link.index, None, label=link.label):
                        for start, end in pairwise(run_bounds(numbers).tolist()):
                            run = pages[start:end].reshape(-1).data
                            os.pwrite(file.fileno(), run, int(numbers[start]) * PAGE_SIZE)
                    os.fsync(file.fileno())
                parent = sha256(self._links[below].path) if below else None
                self._links[link.root] = _File(path, parent)
            below = link.root
        self._chains[chain[-1].root] = tuple(link.root for link in chain)

    def assemble(self, root: str) -> OpenImage:
        """The memory of the head with this root, in a new file; `last` tells how long that took.

        Corrupt: a parent is not what it was.
        """
        chain = [self._links[each] for each in self._chains[root]]
        began = time.perf_counter()
        for below, link in pairwise(chain):
            if sha256(below.path) != link.parent_sha256:
                raise Corrupt(f"{below.path}: its content does not match its digest")
        hashed = time.perf_counter()
        path = self.directory / f"assembled-{next(self._numbers)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        os.ftruncate(fd, chain[0].path.stat().st_size)
        _copy_data(chain[0].path, fd)
        copied = time.perf_counter()
        for link in chain[1:]:
            _copy_data(link.path, fd)
        done = time.perf_counter()
        self.last = Assembled(
            *(milliseconds(s) for s in (hashed - began, copied - hashed, done - copied))
        )
        return OwnImage(path, fd)

    @contextmanager
    def forks_of(self, engine: Engine) -> Iterator[None]:
        """All that `engine` forks in the block maps what `assemble` makes, in place of an image."""
        with images_from(engine, self.open):
            yield

    def open(self, root: str, pages: int) -> OpenImage | None:
        """As `ImageStore.open`."""
        return self.assemble(root) if root in self._chains else None


@contextmanager
def images_from(engine: Engine, source: Callable[[str, int], OpenImage | None]) -> Iterator[None]:
    """Have the engine ask `source` for images, as it does `ImageStore.open` otherwise."""
    own = vars(engine.images)
    own["open"] = source
    try:
        yield
    finally:
        del own["open"]


def sha256(path: Path) -> str:
    """Of all bytes of a file, holes included; blocks."""
    state = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        at, size = 0, os.fstat(fd).st_size
        for start, end in data_of(fd, size):
            _hash_zeros(state, start - at)
            for offset in range(start, end, _CHUNK):
                view = memoryview(buffer)[: min(_CHUNK, end - offset)]
                os.preadv(fd, [view], offset)
                state.update(view)
            at = end
        _hash_zeros(state, size - at)
    finally:
        os.close(fd)
    return state.hexdigest()


def hashing_speed(path: Path) -> tuple[float, float]:
    """Bytes a second: of `sha256` on a file, and of `hashlib` on as many bytes in memory."""
    size = path.stat().st_size
    began = time.perf_counter()
    sha256(path)
    ours = time.perf_counter() - began
    content = path.read_bytes()
    began = time.perf_counter()
    hashlib.sha256(content).digest()
    return size / ours, size / (time.perf_counter() - began)


def _hash_zeros(state: hashlib._Hash, count: int) -> None:
    for _ in range(count // _CHUNK):
        state.update(_ZEROS)
    state.update(_ZEROS[: count % _CHUNK])


def data_of(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data, as byte ranges; between them are holes (lseek(2))."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: none any more
            return
        at = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, at


def _copy_data(source: Path, target: int) -> None:
    fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in data_of(fd, os.fstat(fd).st_size):
            at = start
            while at < end:
                at += os.copy_file_range(fd, target, end - at, at, at)
    finally:
        os.close(fd)
