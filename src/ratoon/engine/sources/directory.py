"""A directory of this host as a tree: all that is on its file system, but for sockets."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Container, Iterator
from pathlib import Path

from ratoon.engine.sources.merge import Tree
from ratoon.engine.sources.tar_stream import (
    BLOCKS,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    HARD_LINK,
    SYMLINK,
    Inode,
    Member,
    is_attribute,
)
from ratoon.errors import Conflict
from ratoon.machine.guest.shared.directories import Cursor, names_in

_CHUNK = 1024 * 1024
_KINDS = {
    stat.S_IFREG: FILE,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHARACTER,
    stat.S_IFBLK: BLOCKS,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFIFO: FIFO,
}
#: A path, the directory that it is in, its name there, and what stat(2) says.
Found = tuple[bytes, int, bytes, os.stat_result]


class Directory:
    """What is in the directory `path` now. The content of its files is read when it is asked for.

    OSError, of all methods; Conflict: something is gone, or another, since it was looked at.
    """

    def __init__(self, path: Path) -> None:
        self.tree = Tree()
        self._path = path
        #: Files that are no directories, and a path of each, by their numbers.
        self._inodes: dict[tuple[int, int], tuple[Inode, bytes]] = {}
        for found, directory, name, status in walk(self._path):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode))
            number = status.st_dev, status.st_ino
            if number in self._inodes:
                link = Member(found, Inode(HARD_LINK), self._inodes[number][1])
                self.tree.add(link, whiteouts=False)
            elif kind is not None:
                inode = _inode(kind, directory, name, status)
                self.tree.add(Member(found, inode), whiteouts=False)
                if kind != DIRECTORY:
                    self._inodes[number] = inode, found

    def contents(self, wanted: Container[Inode]) -> Iterator[tuple[Inode, Iterator[bytes]]]:
        """The content of those files, each to be read to its end before the next."""
        for found, directory, name, status in walk(self._path):
            inode, path = self._inodes.get((status.st_dev, status.st_ino), (None, b""))
            if path == found and inode is not None and inode in wanted:
                yield inode, _content(directory, name, inode.size)


def walk(path: Path) -> Iterator[Found]:
    """All that is in a directory, from itself on, each directory before what is in it.

    Of other file systems there is the place alone. OSError; Conflict: something is gone meanwhile.
    """
    cursor = Cursor(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        top = os.fstat(cursor.fd)
        yield b".", cursor.fd, b".", top
        left = [names_in(cursor.fd)[::-1]]
        while left:
            if not left[-1]:
                left.pop()
                if left:
                    os.close(cursor.leave())
                continue
            name = left[-1].pop()
            status = os.stat(name, dir_fd=cursor.fd, follow_symlinks=False)
            yield cursor.path(name), cursor.fd, name, status
            if stat.S_ISDIR(status.st_mode) and status.st_dev == top.st_dev:
                cursor.enter(name)
                left.append(names_in(cursor.fd)[::-1])
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
            raise Conflict("a directory was changed while it was read; try again") from None
        raise
    finally:
        cursor.close()


def _inode(kind: bytes, directory: int, name: bytes, status: os.stat_result) -> Inode:
    return Inode(
        kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size=status.st_size if kind == FILE else 0,
        target=os.readlink(name, dir_fd=directory) if kind == SYMLINK else b"",
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)),
        attributes=_attributes(b"/proc/self/fd/%d/%b" % (directory, name)),
    )


def _attributes(path: bytes) -> dict[bytes, bytes]:
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return {}
        raise
    return {
        os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
        for name in names
        if is_attribute(os.fsencode(name))
    }


def _content(directory: int, name: bytes, size: int) -> Iterator[bytes]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=directory)
    try:
        while size:
            data = os.read(fd, min(size, _CHUNK))
            if not data:
                raise Conflict("a file was changed while it was read; try again")
            size -= len(data)
            yield data
    finally:
        os.close(fd)
