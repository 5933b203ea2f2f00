"""The system calls that Python's `os` has not: inotify(7), renameat2(2), and mount(2)."""

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
_MS_BIND = 4096
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
    """Mount the file `source` over the file `target`."""
    result = _libc.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None)
    _checked(result, os.fsencode(target))


def _checked(result: int, path: bytes | None = None, other: bytes | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path, None, other)
    return result
