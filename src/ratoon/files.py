"""Durable files, locks and links: the few file system promises that everything else builds on.

What is promised: after `write_durable` or `fsync_tree` + `rename` + `fsync_directory` returned, a
power cut leaves the new content; before it, the old content or none. What is not: that a disk which
lies about its cache keeps its word.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import pwd
import shutil
import stat
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ratoon.errors import HostError

log = logging.getLogger(__name__)

#: `_IOW(0x94, 13, struct file_clone_range)`; the same number on all architectures but a few
#: (ioctl_ficlonerange(2)).
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")
#: Where extents cannot be shared. ENOSPC too: xfs may lack room for its records, and yet for data.
_NO_CLONE = {
    *(errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.ETXTBSY),
    *(errno.EPERM, errno.ENOSPC, errno.EDQUOT),
}
_WAYS_OUT = {
    errno.ENOSPC: "free some space there, or delete snapshots with `ratoon rmi`",
    errno.EDQUOT: "free some space there, or delete snapshots with `ratoon rmi`",
    errno.EIO: "the disk below may be failing, see `dmesg`",
    errno.EROFS: "the file system is read-only, see `dmesg` for why",
    errno.EACCES: "run this as the user who owns the store",
    errno.ENOLCK: "this file system has no locks: set RATOON_HOME to a directory of a local one",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}


def describe(error: OSError) -> str:
    """What failed, on which file, and the way out where one is known; for the person."""
    names = " and ".join(str(name) for name in (error.filename, error.filename2) if name)
    reason = error.strerror or str(error)
    way_out = _WAYS_OUT.get(error.errno or 0)
    return (f"{names}: " if names else "") + reason + (f"; {way_out}" if way_out else "")


def require_own(home: Path) -> None:
    """HostError: the store `home`, which is there, belongs to somebody else.

    Root could use it, and would leave files in it that its owner could not.
    """
    owner = home.stat().st_uid
    if owner != os.geteuid():
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = str(owner)
        raise HostError(
            f"the store {home} belongs to another user, {name}: run this as {name}, or set "
            "RATOON_HOME to another directory"
        )


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an OSError that comes of a descriptor, and so knows no name, that of `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """If the block fails, the file `path` is gone; it need not be there yet."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def new_file(path: Path, mode: int = 0o600) -> Iterator[int]:
    """A new file, open to be written; gone if the block fails. FileExistsError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with removed_on_error(path), naming(path), os.fdopen(fd, "wb", buffering=0):
        yield fd


@dataclass(frozen=True)
class Stamp:
    """What tells, for the price of a `stat`, that a verified file has not been touched since.

    `ctime_ns` is None for layers: every `link()` changes it.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int | None

    @classmethod
    def of(cls, path: Path, *, with_ctime: bool) -> Stamp:
        """The stamp of `path` as it is now; a missing file raises FileNotFoundError."""
        return cls.of_stat(path.stat(), with_ctime=with_ctime)

    @classmethod
    def of_stat(cls, st: os.stat_result, *, with_ctime: bool) -> Stamp:
        """The stamp of the file that was asked with `stat` or `fstat`."""
        ctime = st.st_ctime_ns if with_ctime else None
        return cls(st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, ctime)


def fsync_path(path: Path) -> None:
    """Flush a file's or a directory's content to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Flush every file and directory below `root`, and `root` itself.

    Links are of a directory, and devices have nothing to flush.
    """
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if stat.S_ISREG(path.lstat().st_mode):
                fsync_path(path)
        fsync_path(Path(directory))


def write_durable(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data` at once: readers see the old content or the new, never a part."""
    # The kernel's thread id: no other thread of any process here has it, so no two share the file.
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with removed_on_error(temporary):
        with naming(path), os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    fsync_path(path.parent)


def clone_range(
    source: int, source_offset: int, length: int, target: int, target_offset: int
) -> bool:
    """Have descriptor `target` share a range of `source`'s extents; False where it cannot be done.

    Bytes, whole file system blocks (`length` 0: up to the end). A range that is not shared can be
    written instead; that says whatever else is wrong. A disk that fails raises OSError.
    """
    request = _CLONE_RANGE.pack(source, source_offset, length, target_offset)
    try:
        fcntl.ioctl(target, _FICLONERANGE, request)
    except OSError as error:
        if error.errno not in _NO_CLONE:
            raise
        return False
    return True


def copy_sparse(source: Path, target: Path) -> None:
    """Copy data ranges, sharing them where the file system can; keep holes.

    A failure leaves no `target`.
    """
    with source.open("rb") as src, new_file(target, 0o666) as dst:
        size = os.fstat(src.fileno()).st_size
        os.ftruncate(dst, size)
        end = 0
        while end < size:
            try:
                start = os.lseek(src.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    break
                raise
            end = os.lseek(src.fileno(), start, os.SEEK_HOLE)
            while start < end:
                start += _copy(src.fileno(), dst, start, end - start)


def reflink(source: Path, target: Path) -> bool:
    """Make `target` a file of its own that shares all extents of `source`, where that can be."""
    with source.open("rb") as src, new_file(target, 0o666) as dst:
        if clone_range(src.fileno(), 0, 0, dst, 0):
            return True
        target.unlink()
        return False


def link_or_copy(source: Path, target: Path) -> None:
    """Give the immutable file `source` another name.

    Where no link can be made (too many of them, another file system): a reflink, else a sparse
    copy, and the log says so. Either keeps the modification time, and so the meaning of the
    content, but is another inode. It is as durable as a link: whoever links it on need not know.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EMLINK, errno.EXDEV, errno.EPERM):
            raise
        shared = reflink(source, target)
        if not shared:
            copy_sparse(source, target)
        how = "a reflink shares its extents" if shared else "it was copied"
        log.warning("cannot link %s to %s (%s): %s", source, target, error.strerror, how)
        with removed_on_error(target):
            shutil.copystat(source, target)
            fsync_path(target)


def _copy(source: int, target: int, offset: int, length: int) -> int:
    """Copy up to `length` bytes at `offset`; how many it were."""
    try:
        return os.copy_file_range(source, target, length, offset_src=offset, offset_dst=offset)
    except OSError as error:
        # EXDEV: from one kind of file system to another, since Linux 5.19.
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    os.lseek(target, offset, os.SEEK_SET)
    return os.sendfile(target, source, offset, length)


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the `flock` of `path` (a file made if missing, or a directory); waits for it."""
    fd = _open_lockable(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def try_lock(path: Path) -> int | None:
    """The descriptor that holds the exclusive `flock` of `path`, or None if another holds it.

    Closing the descriptor releases the lock; so does the death of every process that has it.
    """
    return _lock_or_close(_open_lockable(path))


def is_locked(path: Path) -> bool:
    """Whether somebody holds the exclusive `flock` of `path`, a file that need not be there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def try_lock_directory(path: Path) -> int | None:
    """As `try_lock`, for a directory that may vanish: makes nothing, raises FileNotFoundError."""
    return _lock_or_close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _lock_or_close(fd: int) -> int | None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_lockable(path: Path) -> int:
    with suppress(IsADirectoryError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
