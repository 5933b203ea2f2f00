"""The files that snapshots consist of: what manifests say of them, and which inodes they are.

A layer has a name in its own snapshot and in each that descends from it. It is looked at once, and
called by the snapshot that added it. Any name may vanish at any time, because snapshots are deleted
while others look at them: what has no name left is not missing, but deleted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ratoon.errors import RatoonError
from ratoon.store.check.findings import Finding, Kind, unreadable
from ratoon.store.memory.compressed import plain_size
from ratoon.store.snapshot.snapshot import ANCESTRY, Snapshot

#: Device and inode number.
Identity = tuple[int, int]


def identity_of(path: Path) -> Identity | None:
    """What `path` is at this moment; None: there is nothing. Follows no link."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


@dataclass(frozen=True)
class Surveyed:
    """A snapshot, and the identity of the directory that it was read from."""

    snapshot: Snapshot
    identity: Identity | None

    @property
    def tag(self) -> str:
        return self.snapshot.manifest.tag

    def exists(self) -> bool:
        """Whether it has not been deleted meanwhile, and perhaps made anew."""
        return identity_of(self.snapshot.path) == self.identity


@dataclass(frozen=True)
class Expected:
    """What a manifest says of a file; `kind` is what a finding about it is.

    `tag` names the snapshot that added it. `digest` is that of the index for a memory layer, of the
    content otherwise; `size` is in bytes.
    """

    kind: Kind
    tag: str
    digest: str
    size: int


@dataclass(frozen=True)
class StoredFile:
    """An inode of the store and its names, the one in the snapshot that added it first."""

    identity: Identity
    expected: Expected
    names: tuple[Path, ...]

    def exists(self) -> bool:
        """Whether one of its names still is this inode."""
        return any(identity_of(name) == self.identity for name in self.names)

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """A path to this very inode, which stays readable when its names are gone.

        FileNotFoundError: none of its names is this inode any more. OSError: it cannot be opened.
        """
        fd = self._open()
        try:
            yield Path(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)

    def _open(self) -> int:
        for name in self.names:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) == self.identity:
                return fd
            os.close(fd)
        raise FileNotFoundError(f"{self.names[0]} was deleted meanwhile")

    def finding(self, what: str, page: int | None = None) -> Finding:
        """A finding about this file."""
        expected = self.expected
        return Finding.of(expected.kind, self.names[0], what, snapshot=expected.tag, page=page)


def expected_files(snapshot: Snapshot) -> Iterator[tuple[Path, Expected]]:
    """Every file that the manifest speaks of, by its path in the snapshot's directory."""
    manifest = snapshot.manifest
    state = manifest.vmstate
    yield snapshot.vmstate_path, Expected(Kind.VMSTATE, manifest.tag, state.digest, state.size)
    for number, layer in enumerate(manifest.layers):
        memory, disk = layer.memory, layer.disk
        yield (
            snapshot.memory_path(number),
            Expected(Kind.MEMORY, layer.tag, memory.index_digest, memory.size),
        )
        yield (
            snapshot.disk_path(number),
            Expected(Kind.DISK, layer.tag, disk.digest, disk.size),
        )


def take_inventory(
    surveyed: Iterable[Surveyed],
) -> tuple[Sequence[StoredFile], Sequence[Finding]]:
    """The files of the right type and size, each inode once; findings for what is not.

    An inode of which manifests say different things is there once for each.
    """
    names: dict[tuple[Identity, Expected], list[Path]] = {}
    stats: dict[Identity, os.stat_result] = {}
    findings: list[Finding] = []
    for entry in surveyed:
        for path, expected in expected_files(entry.snapshot):
            try:
                found = path.lstat()
            except OSError as error:
                if entry.exists():
                    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
                    what = "missing" if gone else unreadable(error)
                    findings.append(Finding.of(expected.kind, path, what, snapshot=expected.tag))
                continue
            identity = found.st_dev, found.st_ino
            stats[identity] = found
            names.setdefault((identity, expected), []).append(path)
    files = []
    for (identity, expected), paths in names.items():
        paths.sort(key=lambda path: (path.parent.parent.name == ANCESTRY, path))
        file = StoredFile(identity, expected, tuple(paths))
        misfit = _misfit(file, stats[identity])
        if not misfit:
            files.append(file)
        elif file.exists():
            findings.append(file.finding(misfit))
        if expected.kind is Kind.MEMORY and not misfit and stats[identity].st_mode & 0o222:
            what = "a published layer can be written to; its mode must be 0444"
            findings.append(Finding.of(Kind.MODE, file.names[0], what, snapshot=expected.tag))
    return files, findings


def _misfit(file: StoredFile, found: os.stat_result) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    size, expected = found.st_size, file.expected
    if size != expected.size and expected.kind is Kind.MEMORY:  # it may be compressed
        try:
            with file.opened() as path:
                size = plain_size(path, label="memory layer")
        except FileNotFoundError:  # deleted meanwhile
            return None
        except OSError as error:
            return unreadable(error)
        except RatoonError as error:
            return str(error)
    return (
        None
        if size == expected.size
        else f"{size} bytes long, but the manifest says {expected.size}"
    )
