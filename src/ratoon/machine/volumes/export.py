"""A directory of this host as a guest may use it: by handles and single names, never by paths.

A name is one component, is never followed if it is a link, and does not lead to another mount. So
nothing outside of the directory is reached. A file that somebody on the host moves out of it stays
within reach of a guest that knows it, as it would for a process that has it open.

Who may do what this host's kernel decides: a thread that calls has taken on the rights of who asks
(`callers.acting_as`), and has no others here. There are no device nodes and no set-user-id bits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ratoon import syscalls
from ratoon.errors import InvalidInput, NotFound
from ratoon.machine.volumes import callers
from ratoon.machine.volumes.callers import Caller, acting, as_root
from ratoon.machine.volumes.handles import Handles, volume_id
from ratoon.syscalls import NOW, is_allowed

READ, LOOKUP, MODIFY, EXTEND, DELETE, EXECUTE = 1, 2, 4, 8, 16, 32
NAME_MAX = 255
_DIRECTORY_BYTES = 32 * 1024
#: struct linux_dirent64: inode, offset of the next, length, type; then the name.
_ENTRY = struct.Struct("=QqHB")
_SET_IDS = stat.S_ISUID | stat.S_ISGID


@dataclass(frozen=True)
class Changes:
    """What is to be set of a file; None: nothing. Times are in nanoseconds, or NOW."""

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
            callers.require()
        except OSError as error:
            raise InvalidInput(
                f"{source} can be no volume: the users of a guest cannot be acted for "
                f"({error.strerror}); be root, with CAP_SETUID and CAP_SETGID"
            ) from None
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
        try:
            self.handles = Handles(self._root, self.id, key)
        except OSError as error:
            os.close(self._root)
            raise InvalidInput(
                f"{source} can be no volume: its file system has no handles that last "
                f"({error.strerror}), as overlayfs has none; use a directory on ext4, xfs, btrfs "
                "or tmpfs"
            ) from None
        found = os.fstat(self._root)
        self._device = found.st_dev
        #: Whether nothing on this mount is a program to the host; in the guest it may be one.
        self._noexec = bool(os.fstatvfs(self._root).f_flag & os.ST_NOEXEC)
        #: The directory itself, by whatever name.
        self.identity = found.st_dev, found.st_ino

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
        """A descriptor (O_PATH) of what the handle names; this thread is root. ForeignHandle."""
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
            self.handles.seen(directory, name)
            yield fd
        finally:
            os.close(fd)

    # Reading --------------------------------------------------------------------------------------

    def allowed(self, fd: int, caller: Caller, wanted: int) -> int:
        """Which of the wanted kinds of access the caller has, for whom this thread acts."""
        found = os.fstat(fd)
        granted = 0
        if wanted & READ and is_allowed(fd, os.R_OK):
            granted |= READ
        if wanted & (MODIFY | EXTEND | DELETE) and not self.read_only and is_allowed(fd, os.W_OK):
            granted |= MODIFY | EXTEND | DELETE
        if wanted & (LOOKUP | EXECUTE):
            if stat.S_ISDIR(found.st_mode):
                granted |= LOOKUP if is_allowed(fd, os.X_OK) else 0
            elif is_allowed(fd, os.X_OK) or (self._noexec and _executable(found, caller)):
                granted |= EXECUTE
        return granted & wanted

    def read(self, fd: int, offset: int, count: int) -> tuple[bytes, bool]:
        """Bytes of a regular file, and whether they are its last."""
        with _regular(fd, os.O_RDONLY) as file:
            data = os.pread(file, count, _position(offset))
            return data, offset + len(data) >= os.fstat(file).st_size

    def link_text(self, fd: int) -> bytes:
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no link")
        return os.readlink(b"", dir_fd=fd)

    def entries(self, fd: int, cookie: int) -> Iterator[Entry]:
        """The names in a directory from a place on; 0 is its beginning."""
        with _opened(fd, os.O_RDONLY | os.O_DIRECTORY) as opened:
            os.lseek(opened, _position(cookie), os.SEEK_SET)
            while data := syscalls.read_directory(opened, _DIRECTORY_BYTES):
                at = 0
                while at < len(data):
                    inode, following, size, _ = _ENTRY.unpack_from(data, at)
                    name = data[at + _ENTRY.size : at + size].split(b"\0", 1)[0]
                    yield Entry(inode, name, following)
                    at += size

    def space(self) -> os.statvfs_result:
        return os.fstatvfs(self._root)

    # Changing -------------------------------------------------------------------------------------

    def require_writable(self) -> None:
        if self.read_only:
            raise OSError(errno.EROFS, "a read-only volume")

    def write(self, fd: int, offset: int, data: memoryview, *, sync: bool) -> None:
        with _writable(fd) as file:
            _position(offset + len(data))
            done = 0
            while done < len(data):
                done += os.pwrite(file, data[done:], offset + done)
            if sync:
                os.fsync(file)

    def sync(self, fd: int) -> None:
        """Have the disk know a file; anybody may, as with sync(2)."""
        with as_root(), _regular(fd, os.O_RDONLY) as file:
            os.fsync(file)

    def change(self, fd: int, changes: Changes) -> None:
        name = f"/proc/self/fd/{fd}"
        mode, mtime = os.fstat(fd).st_mode, changes.mtime
        if changes.size is not None:
            with _writable(fd) as file:
                os.ftruncate(file, _position(changes.size))
            mtime = None if mtime == NOW else mtime  # that is done
        if changes.uid is not None or changes.gid is not None:
            _give(name, _or_same(changes.uid), _or_same(changes.gid))
        if changes.mode is not None and not stat.S_ISLNK(mode):
            Path(name).chmod(changes.mode & _permitted(mode))
        if changes.atime is not None or mtime is not None:
            _set_times(fd, changes.atime, mtime)

    def create(self, directory: int, name: bytes, changes: Changes) -> None:
        """A new, empty regular file; FileExistsError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        mode = (changes.mode or 0) & _permitted(stat.S_IFREG)
        fd = os.open(checked(name), flags, mode, dir_fd=directory)
        try:
            self._finish(fd, changes)
        finally:
            os.close(fd)

    def make_directory(self, directory: int, name: bytes, changes: Changes) -> None:
        os.mkdir(checked(name), changes.mode or 0, dir_fd=directory)
        with self.child(directory, name) as fd:
            self._finish(fd, changes)

    def make_link(self, directory: int, name: bytes, text: bytes, changes: Changes) -> None:
        """A symbolic link; where it leads is nobody's business but the guest's."""
        if not text or b"\0" in text:
            raise OSError(errno.EINVAL, "a link that leads nowhere")
        os.symlink(text, checked(name), dir_fd=directory)
        with self.child(directory, name) as fd:
            self._finish(fd, changes)

    def add_name(self, fd: int, directory: int, name: bytes) -> None:
        """A hard link."""
        os.link(f"/proc/self/fd/{fd}", checked(name), dst_dir_fd=directory, follow_symlinks=True)
        self.handles.seen(directory, name)

    def remove(self, directory: int, name: bytes) -> None:
        os.unlink(checked(name), dir_fd=directory)

    def remove_directory(self, directory: int, name: bytes) -> None:
        os.rmdir(checked(name), dir_fd=directory)

    def rename(self, source: int, old: bytes, target: int, new: bytes) -> None:
        os.rename(checked(old), checked(new), src_dir_fd=source, dst_dir_fd=target)
        self.handles.seen(target, new)

    def _finish(self, fd: int, changes: Changes) -> None:
        """Set of something new what cannot be said when it is made; mostly nothing."""
        left = replace(changes, mode=None)
        if left != Changes():
            self.change(fd, left)


def checked(name: bytes) -> bytes:
    """A name of one component, for the system; PermissionError, OSError: there can be none such."""
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise PermissionError(errno.EACCES, "no name")
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, "a name that is too long")
    return name


def _executable(found: os.stat_result, caller: Caller) -> bool:
    """The same of a program, by its mode alone."""
    if caller.uid == 0:
        return bool(found.st_mode & 0o111)
    if caller.uid == found.st_uid:
        return bool(found.st_mode & 0o100)
    of_group = found.st_gid in (caller.gid, *caller.groups)
    return bool(found.st_mode & (0o010 if of_group else 0o001))


@contextmanager
def _opened(fd: int, flags: int) -> Iterator[int]:
    """Open what an O_PATH descriptor names; the caller sees to it that this does not block.

    A guest's kernel asks for rights when a program opens a file, and open it stays whatever becomes
    of them. So the owner may, always. To run a program it is read, so who may do that may read it.
    """
    name, flags = f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        opened = os.open(name, flags)
    except PermissionError as error:
        found = os.fstat(fd)
        runs = stat.S_ISREG(found.st_mode) and not flags & os.O_WRONLY and is_allowed(fd, os.X_OK)
        # Who has no id in this user namespace seems to be 65534: root has no more of his either.
        if error.errno != errno.EACCES or not (runs or found.st_uid == acting()):
            raise
        with as_root():
            opened = os.open(name, flags)
    try:
        yield opened
    finally:
        os.close(opened)


@contextmanager
def _regular(fd: int, flags: int) -> Iterator[int]:
    """Open what may be opened without a wait: nothing but regular files."""
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "no regular file")
    with _opened(fd, flags) as opened:
        yield opened


@contextmanager
def _writable(fd: int) -> Iterator[int]:
    """Open a file to change what is in it: a program that the host gave another identity loses it.

    The kernel does so too, but not if root writes; and the guest's root is not the host's.
    """
    with _regular(fd, os.O_WRONLY) as file:
        mode = os.fstat(file).st_mode
        if mode & _SET_IDS:
            with as_root():
                os.fchmod(file, mode & _permitted(mode))
        yield file


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


def _give(name: str, uid: int, gid: int) -> None:
    """chown(2). PermissionError: in this user namespace nobody has such an id."""
    try:
        os.chown(name, uid, gid)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise PermissionError(errno.EPERM, "there is no such user or group here") from None


def _set_times(fd: int, atime: int | None, mtime: int | None) -> None:
    """Set times; None: as it is. NOW may be set by whoever may write, one of both too.

    That a user has cut off nothing at a file's end is said that way, and to the kernel it would be
    the owner's alone.
    """
    name = os.fsencode(f"/proc/self/fd/{fd}")
    try:
        syscalls.set_times(name, atime, mtime)
    except PermissionError:
        if {atime, mtime} - {NOW, None} or not is_allowed(fd, os.W_OK):
            raise
        with as_root():
            syscalls.set_times(name, atime, mtime)
