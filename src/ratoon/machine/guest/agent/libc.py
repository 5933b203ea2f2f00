"""The system calls that Python's `os` has not: each raises OSError, as its own do."""

from __future__ import annotations

import ctypes
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

IN_MODIFY, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x2, 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF = 0x400, 0x800
IN_Q_OVERFLOW, IN_IGNORED, IN_ISDIR = 0x4000, 0x8000, 0x4000_0000
IN_ONLYDIR, IN_DONT_FOLLOW, IN_EXCL_UNLINK = 0x0100_0000, 0x0200_0000, 0x0400_0000

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, _MS_BIND, _MS_MOVE = 1, 2, 4, 8, 4096, 8192
_MS_REC, _MS_SLAVE, _MS_SHARED = 0x4000, 0x8_0000, 0x10_0000
_MNT_DETACH = 2
CLONE_NEWNS, CLONE_NEWPID = 0x2_0000, 0x2000_0000
_INIT_MODULE, _SYNCFS = 175, 306
_EVENT = struct.Struct("iIII")
_libc = ctypes.CDLL(None, use_errno=True)


def inotify_init() -> int:
    return _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))


def inotify_add(fd: int, path: bytes, mask: int) -> int:
    """The number of the watch; that of an earlier one where `path` is watched already."""
    return _checked(_libc.inotify_add_watch(fd, path, mask), path)


def inotify_remove(fd: int, watch: int) -> None:
    """There is nothing to be done if the kernel has removed it already."""
    _libc.inotify_rm_watch(fd, watch)


def inotify_events(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Of what was read: the watch, the mask, the cookie and the name of each event."""
    at = 0
    while at < len(data):
        watch, mask, cookie, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size
        yield watch, mask, cookie, data[at : at + length].rstrip(b"\0")
        at += length


def rename_to_nothing(source: bytes, target: bytes) -> None:
    """Rename; FileExistsError where `target` is there already."""
    result = _libc.renameat2(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE)
    _checked(result, source, target)


def bind(source: str, target: str) -> None:
    """Mount the file or directory `source` over `target`, which is one as well."""
    mount(os.fsencode(source), target, None, _MS_BIND, None)


def bind_all(source: str, target: str) -> None:
    """As `bind`, with what is mounted below."""
    mount(os.fsencode(source), target, None, _MS_BIND | _MS_REC, None)


def share_mounts() -> None:
    """Let what is mounted later be seen in namespaces that are made from this one."""
    mount(b"", "/", None, _MS_REC | _MS_SHARED, None)


def follow_mounts() -> None:
    """See what is mounted where this namespace was made from, and show nothing there."""
    mount(b"", "/", None, _MS_REC | _MS_SLAVE, None)


def unshare(flags: int) -> None:
    """With CLONE_NEWPID it is the next child that is in the new one, as process 1: unshare(2)."""
    _checked(_libc.unshare(flags))


def enter_namespace(fd: int, kind: int) -> None:
    """As for `unshare`, with CLONE_NEWPID it is children that will be in it: setns(2)."""
    _checked(_libc.setns(fd, kind))


def enter_root(root: str) -> None:
    """Have what is mounted at `root` as the root of all that is mounted, and be there.

    Not by chroot alone: who is in such a root can make no user namespaces (EPERM). The kernel's own
    threads, which share the root of process 1, come along, and so do programs that they start.
    """
    os.chdir(root)
    mount(b".", "/", None, _MS_MOVE, None)
    os.chroot(".")
    os.chdir("/")


def mount(source: bytes, target: str, kind: bytes | None, flags: int, data: bytes | None) -> None:
    """Mount something on `target`: mount(2)."""
    _checked(_libc.mount(source, os.fsencode(target), kind, flags, data), target)


def unmount(target: str) -> None:
    """OSError, EBUSY: somebody uses it; umount2(2)."""
    _checked(_libc.umount2(os.fsencode(target), 0), target)


def detach(target: str) -> None:
    """What has files there open keeps them: umount2(2) with MNT_DETACH."""
    _checked(_libc.umount2(os.fsencode(target), _MNT_DETACH), target)


def sync_file_system(fd: int) -> None:
    """Have all of the file system written that `fd` is on: syncfs(2)."""
    _checked(_libc.syscall(_SYNCFS, fd))


def load_module(module: bytes, name: str) -> None:
    """FileExistsError: it is there. `name` is for errors: init_module(2)."""
    _checked(_libc.syscall(_INIT_MODULE, module, ctypes.c_ulong(len(module)), b""), name)


def _checked(result: int, path: str | bytes | None = None, other: bytes | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path, None, other)
    return result
