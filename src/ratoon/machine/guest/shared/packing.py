"""A file or a tree into a tar stream, piece by piece."""

from __future__ import annotations

import errno
import os
import stat

from . import tar
from .directories import Cursor, names_in

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

#: Bytes read from a file at once.
CHUNK = 64 * 1024
#: Of small things, so many bytes are gathered: a few of them are a pause's worth of system calls.
GATHERED = 16 * 1024
#: Bytes of a file that is made as it is read: it is held in memory, for its size comes first.
MAX_MADE = 32 * 1024 * 1024
#: Longer names no system call takes.
MAX_NAME = 4095
#: What was left out is listed up to here, and counted.
MAX_LISTED = 1000
MAX_SHOWN = 200


class LeftOut:
    """What a transfer did not carry, and why."""

    def __init__(self) -> None:
        self.count = 0
        self.listed: list[str] = []

    def add(self, name: bytes, reason: str) -> None:
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            shown = name if len(name) <= MAX_SHOWN else name[:MAX_SHOWN] + b"..."
            self.listed.append(f"{shown.decode('utf-8', 'surrogateescape')}: {reason}")


class Packer:
    """Packs the directory or regular file `path`.

    Sockets, pipes and devices are left out, and what another file system holds. A tree that changes
    meanwhile is packed as it is met, each thing for itself; only a file that becomes shorter while
    it is read is an error.

    What a file of /proc or /sys has is known when it is read to its end, whatever its size is said
    to be; those of a tree that cannot be read are left out.
    """

    def __init__(self, path: bytes, *, owners: bool) -> None:
        """`owners`: carry them; else all belongs to root. Raises OSError."""
        self._path = path
        self._owners = owners
        self._status = os.stat(path)
        #: Such a file system stores nothing, and makes content as it is read.
        self._stores = bool(os.statvfs(path).f_blocks)
        #: Of files with several names, the one that was packed.
        self._first_names: dict[tuple[int, int], bytes] = {}
        self._gathered = bytearray()
        self.entries = 0
        self.left_out = LeftOut()

    def chunks(self) -> Generator[bytes, None, None]:
        """The archive. An unfinished iteration is to be closed: it holds descriptors."""
        if stat.S_ISDIR(self._status.st_mode):
            yield from self._tree()
        elif stat.S_ISREG(self._status.st_mode):
            try:
                yield from self._file(self._path, None, os.path.basename(self._path))
            except OSError as error:
                error.filename = self._path
                raise
        else:
            raise OSError(errno.EINVAL, "neither a file nor a directory", self._path)
        yield bytes(self._gathered) + tar.END

    def _tree(self) -> Iterator[bytes]:
        cursor = Cursor(os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            self._add(b".", tar.DIRECTORY, os.fstat(cursor.fd))
            to_do = [names_in(cursor.fd)[::-1]]
            while to_do:
                if not to_do[-1]:
                    to_do.pop()
                    if to_do:
                        os.close(cursor.leave())
                    continue
                name = to_do[-1].pop()
                try:
                    if (yield from self._thing(name, cursor)):
                        cursor.enter(name)
                        to_do.append(names_in(cursor.fd)[::-1])
                except (FileNotFoundError, NotADirectoryError):
                    pass  # it is gone again, or is something else by now
                except OSError as error:
                    error.filename = os.path.join(self._path, cursor.path(name))
                    raise
                if len(self._gathered) >= GATHERED:
                    yield self._take()
        finally:
            cursor.close()

    def _thing(self, name: bytes, cursor: Cursor) -> Generator[bytes, None, bool]:
        """Pack what is called `name` at the cursor; true if it is to be entered."""
        status = os.stat(name, dir_fd=cursor.fd, follow_symlinks=False)
        path = cursor.path(name)
        kind = stat.S_IFMT(status.st_mode)
        if len(path) > MAX_NAME:
            self.left_out.add(path, "its name is too long")
        elif kind == stat.S_IFDIR:
            self._add(path, tar.DIRECTORY, status)
            if status.st_dev == self._status.st_dev:
                return True
            self.left_out.add(path, "what is in it is on another file system")
        elif kind == stat.S_IFLNK:
            self._add(path, tar.SYMLINK, status, os.readlink(name, dir_fd=cursor.fd))
        elif kind == stat.S_IFREG:
            try:
                yield from self._file(name, cursor.fd, path)
            except FileNotFoundError:
                raise
            except OSError as error:
                if self._stores or status.st_blocks:
                    raise
                self.left_out.add(path, error.strerror or "")
        else:
            self.left_out.add(path, "neither a file, a directory nor a link")
        return False

    def _file(self, name: bytes, directory: int | None, path: bytes) -> Iterator[bytes]:
        # Only the root, which has no directory, may be reached by a link.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags | (os.O_NOFOLLOW if directory else 0), dir_fd=directory)
        try:
            status = os.fstat(fd)
            if status.st_nlink > 1:
                identity = status.st_dev, status.st_ino
                first = self._first_names.setdefault(identity, path)
                if first != path:
                    self._add(path, tar.HARD_LINK, status, first)
                    return
            if not self._stores and not status.st_blocks:
                fd = _read_whole(fd)
            left = size = os.fstat(fd).st_size
            self._add(path, tar.FILE, status, size=size)
            while left:
                data = os.read(fd, min(CHUNK, left))
                if not data:
                    raise OSError(errno.ESTALE, "it became shorter while it was read")
                left -= len(data)
                if self._gathered:
                    self._gathered += data
                    data = self._take()
                yield data
            self._gathered += tar.padding(size)
        finally:
            os.close(fd)

    def _add(
        self,
        path: bytes,
        kind: bytes,
        status: os.stat_result,
        target: bytes = b"",
        *,
        size: int = 0,
    ) -> None:
        self.entries += 1
        entry = tar.Entry(
            path,
            kind,
            size=size,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid if self._owners else 0,
            gid=status.st_gid if self._owners else 0,
            mtime_ns=status.st_mtime_ns,
            target=target,
        )
        self._gathered += tar.encode(entry)

    def _take(self) -> bytes:
        gathered = bytes(self._gathered)
        self._gathered.clear()
        return gathered


def _read_whole(made: int) -> int:
    """A file in memory with what is read from `made`, in place of it; closes that."""
    memory = os.memfd_create("made", os.MFD_CLOEXEC)
    try:
        size = 0
        while data := os.read(made, CHUNK):
            size += os.write(memory, data)
            if size > MAX_MADE:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    except BaseException:
        os.close(memory)
        raise
    os.lseek(memory, 0, os.SEEK_SET)
    os.close(made)
    return memory
