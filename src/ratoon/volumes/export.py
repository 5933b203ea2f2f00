"""A directory of this host as a guest may use it: by handles and single names, never by paths.

A name is one component, is never followed if it is a link, and does not lead to another mount. So
nothing outside of the directory is reached. A file that somebody on the host moves out of it stays
within reach of a guest that knows it, as it would for a process that has it open.

Who may do what is the guest's kernel to decide: it asks `allowed`, and what it then asks for is
done. New files belong to whom it says. There are no device nodes and no set-user-id bits.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ratoon.errors import InvalidInput, NotFound
from ratoon.volumes.handles import Handles, volume_id

READ, LOOKUP, MODIFY, EXTEND, DELETE, EXECUTE = 1, 2, 4, 8, 16, 32
NAME_MAX = 255
_DIRECTORY_BYTES = 32 * 1024
#: struct linux_dirent64: inode, offset of the next, length, type; then the name.
_ENTRY = struct.Struct("=QqHB")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Caller:
    """Who asks, as the guest's kernel says."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Changes:
    """What is to be set of a file; None: nothing. Times are in nanoseconds, -1: now."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime: int | None = None
    mtime: int | None = None


@dataclass(frozen=True)
class Entry:
    """A name in a directory; `cookie` is where the next one is found."""

    inode: int
    name: bytes
    cookie: int


class Export:
    """One directory, `source`, open until `close`. All of its methods raise OSError."""

    def __init__(self, source: Path, key: bytes, *, read_only: bool) -> None:
        """InvalidInput, NotFound: it cannot be a volume."""
        self.source = source
        self.read_only = read_only
        try:
            self._root = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(f"no directory {source} on this host; make it first") from None
        except OSError as error:
            raise InvalidInput(f"{source} can be no volume: {error.strerror}") from None
        real = Path(f"/proc/self/fd/{self._root}").readlink()
        if real != source:
            os.close(self._root)
            raise InvalidInput(f"{source} leads to {real} over a symbolic link; name that instead")
        self.id = volume_id(str(source), key)
        self.handles = Handles(self._root, self.id, key)
        found = os.fstat(self._root)
        self._device = found.st_dev
        #: The directory itself, by whatever name.
        self.identity = found.st_dev, found.st_ino
        try:
            os.close(self.handles.open(self.handles.of(self._root)))
        except OSError as error:
            os.close(self._root)
            raise InvalidInput(
                f"{source} can be no volume: its file system has no handles that last "
                f"({error.strerror}), as overlayfs has none; use a directory on ext4, xfs, btrfs "
                "or tmpfs, and be root"
            ) from None

    def close(self) -> None:
        """It is nobody's any more; safe to repeat."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def lock(self) -> None:
        """Have it alone, until `close`. BlockingIOError: somebody else has."""
        fcntl.flock(self._root, fcntl.LOCK_EX | fcntl.LOCK_NB)

    # Finding --------------------------------------------------------------------------------------

    @contextmanager
    def at(self, handle: bytes) -> Iterator[int]:
        """A descriptor (O_PATH) of what the handle names. ForeignHandle."""
        fd = self.handles.open(handle)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def child(self, directory: int, name: bytes) -> Iterator[int]:
        """A descriptor (O_PATH) of what has this name there; of a link, the link."""
        flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(checked(name), flags, dir_fd=directory)
        try:
            if os.fstat(fd).st_dev != self._device:
                raise PermissionError(errno.EACCES, "another file system is mounted there")
            yield fd
        finally:
            os.close(fd)

    # Reading --------------------------------------------------------------------------------------

    def allowed(self, fd: int, caller: Caller, wanted: int) -> int:
        """Which of the wanted kinds of access the caller has, by owner, group and mode."""
        found = os.fstat(fd)
        directory = stat.S_ISDIR(found.st_mode)
        if caller.uid == 0:
            bits = 7 if directory or found.st_mode & 0o111 else 6
        elif caller.uid == found.st_uid:
            bits = found.st_mode >> 6
        elif found.st_gid == caller.gid or found.st_gid in caller.groups:
            bits = found.st_mode >> 3
        else:
            bits = found.st_mode
        granted = READ if bits & 4 else 0
        if bits & 2 and not self.read_only:
            granted |= MODIFY | EXTEND | DELETE
        if bits & 1:
            granted |= LOOKUP if directory else EXECUTE
        return granted & wanted

    def read(self, fd: int, offset: int, count: int) -> tuple[bytes, bool]:
        """Bytes of a regular file, and whether they are its last."""
        with _reopened(fd, os.O_RDONLY) as file:
            data = os.pread(file, count, _position(offset))
            return data, offset + len(data) >= os.fstat(file).st_size

    def link_text(self, fd: int) -> bytes:
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no link")
        return os.readlink(b"", dir_fd=fd)

    def entries(self, fd: int, cookie: int) -> Iterator[Entry]:
        """The names in a directory from a place on; 0 is its beginning."""
        opened = os.open(
            f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC
        )
        try:
            os.lseek(opened, _position(cookie), os.SEEK_SET)
            buffer = ctypes.create_string_buffer(_DIRECTORY_BYTES)
            while (length := _libc.getdents64(opened, buffer, _DIRECTORY_BYTES)) > 0:
                at, data = 0, buffer.raw[:length]
                while at < length:
                    inode, following, size, _ = _ENTRY.unpack_from(data, at)
                    name = data[at + _ENTRY.size : at + size].split(b"\0", 1)[0]
                    yield Entry(inode, name, following)
                    at += size
            if length < 0:
                raise OSError(ctypes.get_errno(), "the directory cannot be read")
        finally:
            os.close(opened)

    def space(self) -> os.statvfs_result:
        return os.fstatvfs(self._root)

    # Changing -------------------------------------------------------------------------------------

    def require_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "a read-only volume")

    def write(self, fd: int, offset: int, data: memoryview, *, sync: bool) -> None:
        with _reopened(fd, os.O_WRONLY) as file:
            _position(offset + len(data))
            done = 0
            while done < len(data):
                done += os.pwrite(file, data[done:], offset + done)
            if sync:
                os.fsync(file)

    def sync(self, fd: int) -> None:
        with _reopened(fd, os.O_RDONLY) as file:
            os.fsync(file)

    def change(self, fd: int, changes: Changes) -> None:
        name = f"/proc/self/fd/{fd}"
        found = os.fstat(fd)
        if changes.size is not None:
            with _reopened(fd, os.O_WRONLY) as file:
                os.ftruncate(file, _position(changes.size))
        if changes.uid is not None or changes.gid is not None:
            os.chown(name, _or_same(changes.uid), _or_same(changes.gid))
        if changes.mode is not None and not stat.S_ISLNK(found.st_mode):
            Path(name).chmod(changes.mode & _permitted(found.st_mode))
        if changes.atime is not None or changes.mtime is not None:
            times = (changes.atime, found.st_atime_ns), (changes.mtime, found.st_mtime_ns)
            _set_times(name, [before if new is None else new for new, before in times])

    def create(self, directory: int, name: bytes, changes: Changes, caller: Caller) -> None:
        """A new, empty regular file; FileExistsError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(checked(name), flags, 0o600, dir_fd=directory))
        self._own(directory, name, changes, caller, default=0o644)

    def make_directory(self, directory: int, name: bytes, changes: Changes, caller: Caller) -> None:
        os.mkdir(checked(name), 0o700, dir_fd=directory)
        self._own(directory, name, changes, caller, default=0o755)

    def make_link(
        self, directory: int, name: bytes, text: bytes, changes: Changes, caller: Caller
    ) -> None:
        """A symbolic link; where it leads is nobody's business but the guest's."""
        if not text or b"\0" in text:
            raise OSError(errno.EINVAL, "a link that leads nowhere")
        os.symlink(text, checked(name), dir_fd=directory)
        self._own(directory, name, changes, caller, default=0o777)

    def add_name(self, fd: int, directory: int, name: bytes) -> None:
        """A hard link."""
        os.link(f"/proc/self/fd/{fd}", checked(name), dst_dir_fd=directory, follow_symlinks=True)

    def remove(self, directory: int, name: bytes) -> None:
        os.unlink(checked(name), dir_fd=directory)

    def remove_directory(self, directory: int, name: bytes) -> None:
        os.rmdir(checked(name), dir_fd=directory)

    def rename(self, source: int, old: bytes, target: int, new: bytes) -> None:
        os.rename(checked(old), checked(new), src_dir_fd=source, dst_dir_fd=target)

    def _own(
        self, directory: int, name: bytes, changes: Changes, caller: Caller, *, default: int
    ) -> None:
        """What is new belongs to the caller, or where the directory says so to its group."""
        above = os.fstat(directory)
        inherited = above.st_gid if above.st_mode & stat.S_ISGID else caller.gid
        with self.child(directory, name) as fd:
            self.change(
                fd,
                Changes(
                    mode=default if changes.mode is None else changes.mode,
                    uid=caller.uid if changes.uid is None else changes.uid,
                    gid=inherited if changes.gid is None else changes.gid,
                    size=changes.size,
                    atime=changes.atime,
                    mtime=changes.mtime,
                ),
            )


def checked(name: bytes) -> bytes:
    """A name of one component, for the system; PermissionError, OSError: there can be none such."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise PermissionError(errno.EACCES, "no name")
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "a name that is too long")
    return name


@contextmanager
def _reopened(fd: int, flags: int) -> Iterator[int]:
    """Open what an O_PATH descriptor names; nothing but regular files, which do not block."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "no regular file")
    opened = os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


def _permitted(mode: int) -> int:
    """Which bits of a mode may be set: none that gives a program another user or group."""
    return 0o3777 if stat.S_ISDIR(mode) else 0o1777


def _position(number: int) -> int:
    if number >= 1 << 63:
        raise OSError(errno.EFBIG, "beyond the end of any file")
    return number


def _or_same(owner: int | None) -> int:
    if owner is None:
        return -1
    if owner >= (1 << 32) - 1:
        raise OSError(errno.EINVAL, "no user")
    return owner


def _set_times(name: str, times: list[int]) -> None:
    now = time.time_ns()
    atime, mtime = (now if each < 0 else each for each in times)
    os.utime(name, ns=(atime, mtime))
