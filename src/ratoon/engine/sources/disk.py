"""Root disks: an ext4 of a given size with a tree of files, as qcow2.

mke2fs makes it, in a cell, of a tar that is written while it reads: nothing is mounted, and nothing
of the tree is on the host's own file systems.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path

from ratoon.engine.sources.furnish import furnish
from ratoon.engine.sources.merge import Tree
from ratoon.engine.sources.tar_stream import CAPABILITY, Inode, header, shown
from ratoon.errors import HostError, InvalidInput, ProgramFailed
from ratoon.machine.guest.shared.tar import END, TarError, padding
from ratoon.store.disk.ext4 import ROOT, Ext4
from ratoon.store.disk.flatten import from_raw
from ratoon.store.disk.tools import tool
from ratoon.store.disk.tree import read_tree
from ratoon.units import MIB

#: Nothing is left for the guest's kernel to initialise later: every fork would do it again.
FILE_SYSTEM = ("-t", "ext4", "-L", "ratoon", "-E", "lazy_itable_init=0,lazy_journal_init=0")
#: Names of a file, and in a directory: as many as ext4 counts. In larger ones mke2fs would take
#: hours besides, for it looks for each new name among all that are there.
_MAX_NAMES = 65_000
#: In a directory with more names the guest's kernel shall not look for one among all: mke2fs writes
#: no hash trees, e2fsck does.
_UNINDEXED = 2000
#: debugfs reads no longer ones.
_MAX_LINE = 8000
#: What mke2fs says where the disk is too small; the host's own disk has other words.
_FULL = re.compile(r"Could not allocate (?:block|inode)|Insufficient space|No free space")

Buffer = bytes | memoryview
Contents = Callable[[Container[Inode]], Iterable[tuple[Inode, Iterable[Buffer]]]]


def make_disk(room: Path, disk_bytes: int, name: str, tree: Tree, contents: Contents) -> None:
    """Make `disk.qcow2` in the directory `room`, with `tree` and what a runtime provides.

    `contents` gives the content of the files that it is asked for, in any order.

    InvalidInput: the disk is too small for image `name`, or it has what ext4 has not. HostError.
    """
    raw = room / "disk.raw"
    raw.touch(mode=0o600)  # the image may be private
    os.truncate(raw, disk_bytes)
    furnish(tree)
    try:
        archive = _Archive(tree)
        if archive.size > disk_bytes:
            raise too_large(name, disk_bytes)
        with tool("mke2fs", disk_bytes) as mke2fs:
            words = ("-q", "-F", *FILE_SYSTEM, "-d", "-", mke2fs.writes(raw))
            mke2fs.run(*words, feed=_writer(archive.pieces(contents)))
        _amend(raw, name, archive.late)
        if archive.widest > _UNINDEXED:
            with tool("e2fsck", disk_bytes) as e2fsck:  # 1: something was changed
                e2fsck.run("-f", "-y", "-D", e2fsck.writes(raw), good=(0, 1))
    except TarError as error:
        raise InvalidInput(f"image {name} cannot be unpacked: {error}") from None
    except ProgramFailed as error:
        if _FULL.search(error.said):
            raise too_large(name, disk_bytes) from None
        raise HostError(f"image {name} was not unpacked: {error.said or error}") from None
    from_raw(raw, room / "disk.qcow2")
    raw.unlink()


def make_empty_disk() -> None:
    """Try out whether any can be made. HostError: it cannot."""
    with tempfile.TemporaryDirectory(prefix="ratoon-") as room:
        make_disk(Path(room), 4 * MIB, "empty", Tree(), lambda wanted: ())


def too_large(name: str, disk_bytes: int) -> InvalidInput:
    """What to say of an image that the disk cannot hold."""
    return InvalidInput(
        f"image {name} does not fit on a disk of {disk_bytes // MIB} MiB; "
        "give it a larger one (--disk-size-mib)"
    )


class _Archive:
    """A tree as mke2fs takes it. TarError: it has what ext4 has not."""

    def __init__(self, tree: Tree) -> None:
        #: Of every inode; a directory comes before what is in it.
        self._names: dict[Inode, list[bytes]] = {}
        #: Bytes of all files, with their holes.
        self.size = 0
        #: Names in the directory with the most.
        self.widest = 0
        #: Paths of what mke2fs takes from a tar in part only.
        self.late: list[tuple[bytes, Inode]] = []
        for path, inode in tree.walk():
            names = self._names.setdefault(inode, [])
            names.append(path)
            self.widest = max(self.widest, len(inode.children))
            if max(len(names), len(inode.children)) > _MAX_NAMES:
                raise TarError(f"{shown(path)} has more than {_MAX_NAMES:,} names")
            if len(names) == 1:
                self.size += inode.size
                if _is_late(inode):
                    self.late.append((path, inode))

    def pieces(self, contents: Contents) -> Iterator[Buffer]:
        """First what has no content to be looked for; last all names but the first."""
        wanted = set()
        for inode, (path, *_) in self._names.items():
            if len(inode.text) < inode.size:
                wanted.add(inode)
            else:
                yield header(path, inode) + inode.text + padding(inode.size)
        for inode, content in contents(wanted):
            yield header(self._names[inode][0], inode)
            yield from content
            yield padding(inode.size)
        for inode, (path, *others) in self._names.items():
            for other in others:
                yield header(other, inode, path)
        yield END


def _writer(pieces: Iterator[Buffer]) -> Callable[[int], None]:
    """What writes them to a descriptor."""

    def write(fd: int) -> None:
        with open(fd, "wb", buffering=MIB, closefd=False) as pipe:
            pipe.writelines(pieces)

    return write


# What mke2fs leaves out of a tar ------------------------------------------------------------------


def _is_late(inode: Inode) -> bool:
    seconds, ns = divmod(inode.mtime_ns, 10**9)
    return bool(ns) or abs(seconds) >= 1 << 31 or bool(inode.attributes.keys() - {CAPABILITY})


def _amend(raw: Path, name: str, late: Sequence[tuple[bytes, Inode]]) -> None:
    """Give files on a disk the attributes and times that they lack."""
    if not late:
        return
    with Ext4(raw, f"image {name}") as system:
        numbers = {path: inode.number for path, inode in read_tree(system).items()}
    commands = (
        command for path, inode in late for command in _commands(numbers.get(path, ROOT), inode)
    )
    with tool("debugfs", raw.stat().st_size) as debugfs:
        words = ("-w", "-f", "-", debugfs.writes(raw))
        said = debugfs.run(*words, feed=_writer(commands), with_errors=True)
    # It goes on after what fails, and has no exit code for that. It repeats each command.
    failed = [line for line in said.splitlines() if not line.startswith(b"debugfs")]
    if failed:
        raise ProgramFailed.of("debugfs", 0, b"\n".join(failed))


def _commands(number: int, inode: Inode) -> Iterator[bytes]:
    """Lines for debugfs. Two bits of `mtime_extra` are the seconds' 33rd and 34th."""
    seconds, ns = divmod(inode.mtime_ns, 10**9)
    low = (seconds + (1 << 31)) % (1 << 32) - (1 << 31)
    yield b"sif <%d> mtime @%d\n" % (number, low)
    yield b"sif <%d> mtime_extra 0x%x\n" % (number, ns << 2 | (seconds - low) >> 32)
    for name, value in inode.attributes.items():
        line = b'ea_set <%d> "%b" "%b"\n' % (
            number,
            name,
            b"".join(b"\\%03o" % byte for byte in value),
        )
        if len(line) > _MAX_LINE:
            raise TarError(f"an attribute of {len(value)} bytes is longer than they can be")
        yield line
