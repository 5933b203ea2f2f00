"""The tree that layers make, one upon the other, in memory: names, links and all but content.

Each entry has the effect that unpacking it has, with nothing unpacked: a link among the directories
of its name leads where it does in the guest, never out. So what is hidden in the end is known
before anything is written. An archive that names `..`, or what cannot be, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ratoon.engine.sources.tar_stream import (
    DIRECTORY,
    HARD_LINK,
    SYMLINK,
    Inode,
    Member,
    shown,
)
from ratoon.machine.guest.shared.tar import TarError

#: Bytes of a name, and of all names that lead to a file: linux/limits.h.
_MAX_NAME, MAX_PATH = 255, 4095
#: Links on a way, as in Linux, and names, those of links included.
_MAX_LINKS, _MAX_STEPS = 40, 4096
#: Bytes of memory that an image's names, targets and attributes may take; and what an entry or a
#: stretch of a sparse file takes besides.
MAX_HELD = 512 * 1024 * 1024
_ENTRY, _STRETCH = 400, 150
_WHITEOUT, _OPAQUE = b".wh.", b".wh..wh..opq"


class Tree:
    """What is on a disk. `add` has all of a layer, between calls of `begin_layer`."""

    def __init__(self) -> None:
        self.root = Inode(DIRECTORY)
        self._held = 0
        #: What the layer itself has put where, and the directories that hold nothing else any more.
        self._own: set[tuple[Inode, bytes]] = set()
        self._cleared: set[Inode] = set()

    def begin_layer(self) -> None:
        """What was added until now can be hidden by whiteouts of what comes."""
        self._own.clear()
        self._cleared.clear()

    def add(self, member: Member, *, whiteouts: bool) -> None:
        """`whiteouts`: names that begin with `.wh.` say what is hidden. TarError."""
        inode = member.inode
        self.hold(_ENTRY + len(member.name) + len(inode.target) + _STRETCH * len(member.stretches))
        self.hold(sum(len(name) + len(value) for name, value in inode.attributes.items()))
        *way, name = _parts(member.name) or [b""]
        if whiteouts and name.startswith(_WHITEOUT):
            self._hide(way, name)
            return
        if not name:
            if inode.kind != DIRECTORY:
                raise TarError("its root is no directory")
            _replace(self.root, inode)
            return
        directory = self._enter(way)
        old = directory.children.get(name)
        self._own.add((directory, name))
        if inode.kind == HARD_LINK:
            directory.children[name] = self._linked(member)
        elif inode.kind == DIRECTORY and old is not None and old.kind == DIRECTORY:
            _replace(old, inode)
        else:
            directory.children[name] = inode

    def hold(self, size: int) -> None:
        """Count memory that is taken. TarError: it is too much."""
        self._held += size
        if self._held > MAX_HELD:
            raise TarError("it has more names than a file system is made of here, a million about")

    def find(self, path: bytes) -> Inode | None:
        """What a path leads to, through links as well."""
        try:
            return self._go(_parts(path), make=False)[-1]
        except (TarError, LookupError):
            return None

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """All paths, each directory before what is in it; the root is `.`. TarError: too long."""
        yield b".", self.root
        left = [(b"", self.root)]
        while left:
            above, directory = left.pop()
            for name, inode in directory.children.items():
                path = above + name
                self.hold(len(path))
                if len(path) > MAX_PATH:
                    raise TarError(f"{shown(path)}… is longer than a path can be")
                yield path, inode
                if inode.kind == DIRECTORY:
                    left.append((path + b"/", inode))

    def _enter(self, way: Sequence[bytes]) -> Inode:
        """The directory that names lead to. Those that are missing are made."""
        directory = self._go(way, make=True)[-1]
        if directory.kind != DIRECTORY:
            raise TarError(f"{shown(b'/'.join(way))} is no directory, but has something in it")
        return directory

    def _go(self, way: Sequence[bytes], *, make: bool) -> list[Inode]:
        """What names lead to, after the directories on the way from the root.

        LookupError: there is none, and it is not to be made.
        """
        found, left = [self.root], [*reversed(way)]
        links = steps = 0
        while left:
            name = left.pop()
            steps += 1
            if found[-1].kind != DIRECTORY:
                raise TarError(f"{shown(b'/'.join(way))} leads through what is no directory")
            if name == b"..":
                del found[max(len(found) - 1, 1) :]
                continue
            inode = found[-1].children.get(name)
            if inode is None:
                if not make:
                    raise LookupError(name)
                self.hold(_ENTRY + len(name))
                inode = found[-1].children[name] = Inode(DIRECTORY)
            if inode.kind != SYMLINK:
                found.append(inode)
                continue
            links += 1
            if inode.target.startswith(b"/"):
                del found[1:]
            left += reversed([part for part in inode.target.split(b"/") if part not in (b"", b".")])
            if links > _MAX_LINKS or steps + len(left) > _MAX_STEPS:
                raise TarError(f"{shown(b'/'.join(way))} leads through too many links")
        return found

    def _linked(self, member: Member) -> Inode:
        """What a hard link is another name for: it is not followed, should it be a link itself."""
        *way, name = _parts(member.link) or [b""]
        try:
            inode = self._go(way, make=False)[-1].children[name]
        except LookupError:
            inode = None
        if inode is None or inode.kind == DIRECTORY:
            raise TarError(f"{shown(member.name)} is a hard link to {shown(member.link)}: no file")
        return inode

    # Whiteouts ------------------------------------------------------------------------------------

    def _hide(self, way: Sequence[bytes], whiteout: bytes) -> None:
        """Of the layers below alone: what this layer itself has put there stays."""
        name = whiteout[len(_WHITEOUT) :]
        if name in (b"", b".", b".."):
            raise TarError(f"{shown(whiteout)} is a whiteout of nothing")
        try:
            directory = self._go(way, make=False)[-1]
        except LookupError:
            return
        if whiteout == _OPAQUE:
            self._clear(directory)
        elif name in directory.children:
            self._clear(directory.children[name])
            self._drop(directory, name)

    def _clear(self, directory: Inode) -> None:
        found, left = [], [directory]
        while left:
            inode = left.pop()
            if inode not in self._cleared:
                self._cleared.add(inode)
                found.append(inode)
                left += (child for child in inode.children.values() if child.children)
        for inode in reversed(found):
            for name in [*inode.children]:
                self._drop(inode, name)

    def _drop(self, directory: Inode, name: bytes) -> None:
        if (directory, name) not in self._own and not directory.children[name].children:
            del directory.children[name]


def _replace(directory: Inode, new: Inode) -> None:
    """What it is becomes what `new` is; what is in it stays."""
    for name in ("mode", "uid", "gid", "mtime_ns", "attributes"):
        setattr(directory, name, getattr(new, name))


def _parts(path: bytes) -> list[bytes]:
    """The names that lead to an entry from the root; an absolute path is one from there too."""
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise TarError(f"{shown(path)} leads up")
    if len(path) > MAX_PATH or any(len(part) > _MAX_NAME for part in parts):
        raise TarError(f"{shown(path)}… is longer than a name can be")
    return parts
