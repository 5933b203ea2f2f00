"""Reading data against its digests: memory pages, disk layers, images; all of it, or a slice.

Every inode is read once, through a descriptor that outlives its names. What cannot be read is
damaged where it cannot be read, and the rest is looked at all the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ratoon.errors import Corrupt, InvalidInput, RatoonError
from ratoon.store.check.findings import Finding, Kind, unreadable
from ratoon.store.check.inventory import StoredFile, identity_of
from ratoon.store.memory.digests import digests_differ, hash_pages
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import PageIndex, read_pages
from ratoon.store.snapshot.progress import ByteProgress, Meter

#: Pages that are read and compared at a time, 4 MiB: the grain of a slice.
GRAIN = 1024
_BLOCK = 4 * 1024 * 1024

MISMATCH = "does not match its digest"


@dataclass(frozen=True)
class Slice:
    """The part `number` of `total`, counted from 1. All parts together are everything.

    What belongs to a part depends on its content alone, so parts that are read on different days
    cover all that was there the whole time.
    """

    number: int
    total: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The slice that `n/t` names; InvalidInput."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise InvalidInput(f"subset {text!r}: use n/t with 1 <= n <= t, as in 2/7")
        return cls(int(match[1]), int(match[2]))

    def has(self, key: str) -> bool:
        digest = blake3(key.encode()).digest(length=8)
        return int.from_bytes(digest) % self.total == self.number - 1


EVERYTHING = Slice(1, 1)


@dataclass(frozen=True)
class Unit:
    """A piece of work: `key` says what content it is about, `size` its bytes."""

    key: str
    size: int
    run: Callable[[], Iterable[Finding]]


def scrub(units: Iterable[Unit], part: Slice, progress: ByteProgress) -> tuple[list[Finding], int]:
    """Do those of `units` that are in `part`: what they found, and the bytes that were read."""
    chosen = [unit for unit in units if part.has(unit.key)]
    total = sum(unit.size for unit in chosen)
    meter = Meter(total, progress)
    findings: list[Finding] = []
    for unit in chosen:
        findings.extend(unit.run())
        meter.add(unit.size)
    return findings, total


def memory_units(file: StoredFile, index_of: Callable[[StoredFile], PageIndex]) -> Iterator[Unit]:
    """The pages of a memory layer whose index is sound."""
    try:
        entries = len(index_of(file).numbers)
    except (RatoonError, OSError):  # deleted, or damaged since its index was checked
        return
    for first in range(0, entries, GRAIN):
        chunk = np.arange(first, min(first + GRAIN, entries))
        run = partial(_check_pages, file, index_of, chunk)
        yield Unit(f"{file.expected.digest}/{first}", len(chunk) * PAGE_SIZE, run)


def disk_unit(file: StoredFile) -> Unit:
    """A disk layer."""
    return Unit(file.expected.digest, file.expected.size, partial(check_content, file))


def flat_disk_unit(path: Path, digest: str) -> Unit:
    """A flattened disk, which had `digest` when it was made."""
    return Unit(digest, path.stat().st_size, partial(_check_flat_disk, path, digest))


def image_units(
    path: Path, tag: str, ram_pages: int, digests: Callable[[], NDArray[np.uint8]]
) -> Iterator[Unit]:
    """The pages of an image of snapshot `tag`; `digests` gives the digest array of its root."""
    for first in range(0, ram_pages, GRAIN):
        count = min(GRAIN, ram_pages - first)
        run = partial(_check_image, path, tag, digests, first, count)
        yield Unit(f"{path.stem}/{first}", count * PAGE_SIZE, run)


def check_content(file: StoredFile) -> Iterator[Finding]:
    """Compare a whole file with its digest."""
    try:
        with file.opened() as path:
            found = digest_of(path)
    except FileNotFoundError:
        return
    except OSError as error:
        what = unreadable(error)
    else:
        if found == file.expected.digest:
            return
        what = f"its content {MISMATCH}"
    if file.exists():
        yield file.finding(what)


def _check_flat_disk(path: Path, digest: str) -> Iterator[Finding]:
    identity = identity_of(path)
    try:
        if digest_of(path) == digest:
            return
        what = f"its content {MISMATCH}"
    except FileNotFoundError:
        return
    except OSError as error:
        what = unreadable(error)
    if identity_of(path) == identity:
        yield Finding.of(Kind.IMAGE, path, what)


def digest_of(path: Path) -> str:
    """BLAKE3 (hex) of a file, by reading it: mapped, what cannot be read would kill the process."""
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def _check_pages(
    file: StoredFile, index_of: Callable[[StoredFile], PageIndex], chunk: NDArray[np.int64]
) -> Iterator[Finding]:
    try:
        with file.opened() as path:
            index = index_of(file)
            bad = list(_bad_pages(path, index, chunk))
    except FileNotFoundError:
        return
    except (RatoonError, OSError) as error:
        bad = [(-1, unreadable(error) if isinstance(error, OSError) else str(error))]
    if bad and file.exists():
        for page, what in bad:
            yield file.finding(what, page=page if page >= 0 else None)


def _bad_pages(path: Path, index: PageIndex, chunk: NDArray[np.int64]) -> Iterator[tuple[int, str]]:
    """All together first; if that fails, one by one."""
    try:
        for _ in read_pages(path, index, chunk, label="layer"):
            pass
        return
    except (RatoonError, OSError):
        pass
    for at in range(len(chunk)):
        page = int(index.numbers[chunk[at]])
        try:
            for _ in read_pages(path, index, chunk[at : at + 1], label="layer"):
                pass
        except Corrupt:
            yield page, f"page {page} {MISMATCH}"
        except OSError as error:
            yield page, f"page {page} {unreadable(error)}"


def _check_image(
    path: Path, tag: str, digests: Callable[[], NDArray[np.uint8]], first: int, count: int
) -> Iterator[Finding]:
    identity = identity_of(path)
    bad: list[tuple[int | None, str]] = []
    try:
        expected = digests()[first : first + count]
    except (RatoonError, OSError):  # a layer was deleted, or damaged since its index was checked
        return
    try:
        with path.open("rb", buffering=0) as file:
            for row, what in _bad_image_pages(file.fileno(), expected, first):
                bad.append((first + row, f"page {first + row} {what}"))
    except FileNotFoundError:
        return
    except OSError as error:
        bad.append((None, unreadable(error)))
    if identity_of(path) == identity:
        for page, what in bad:
            yield Finding.of(Kind.IMAGE, path, what, snapshot=tag or None, page=page)


def _bad_image_pages(fd: int, expected: NDArray[np.uint8], first: int) -> Iterator[tuple[int, str]]:
    try:
        pages = read_image(fd, first, len(expected))
    except OSError:
        for row in range(len(expected)):
            try:
                page = read_image(fd, first + row, 1)
            except OSError as error:
                yield row, unreadable(error)
            else:
                if digests_differ(hash_pages(page), expected[row : row + 1])[0]:
                    yield row, MISMATCH
        return
    for row in np.flatnonzero(digests_differ(hash_pages(pages), expected)).tolist():
        yield row, MISMATCH


def read_image(fd: int, first: int, count: int) -> NDArray[np.uint8]:
    """`count` pages from number `first` on, shape (count, 4096); zeros past the file's end."""
    pages = np.zeros((count, PAGE_SIZE), np.uint8)
    target, offset = pages.reshape(-1).data, first * PAGE_SIZE
    while target and (read := os.preadv(fd, [target], offset)):
        target, offset = target[read:], offset + read
    return pages
