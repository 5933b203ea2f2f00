"""System calls that Python has no functions for; each raises OSError, as its own do.

Three have their own: the agent in a guest, which stands alone (`guest/agent/libc.py`); a program
that runs without this package (`sources/mounted.py`); and `volumes/callers.py`, with all that is a
thread's own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from pathlib import Path

#: linux/sched.h
CLONE_NEWNET = 0x40000000
_AT_FDCWD, _AT_EACCESS, _AT_EMPTY_PATH = -100, 0x200, 0x1000
_FACCESSAT2 = 439
_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
#: A time that is to be set: that of this host.
NOW = -1
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
#: struct ucred: process, user, group.
_CREDENTIALS = struct.Struct("=iII")
#: struct file_handle: how many bytes, their type; then the bytes.
_HANDLE = struct.Struct("=Ii")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
for _function in (_libc.process_vm_readv, _libc.process_vm_writev):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = (ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong)


def unshare(flags: int) -> None:
    """Have the calling thread in new namespaces: unshare(2)."""
    _checked(_libc.unshare(flags))


def setns(namespace: int, kind: int) -> None:
    """Have the calling thread in the namespace of a descriptor: setns(2)."""
    _checked(_libc.setns(namespace, kind))


def exchange(first: Path, second: Path) -> None:
    """Swap what the two paths name, at one instant: renameat2(2) with RENAME_EXCHANGE."""
    if not hasattr(_libc, "renameat2"):  # a libc without it
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(first), None, str(second))
    old, new = os.fsencode(first), os.fsencode(second)
    if _libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(first), None, str(second))


def start_flushing(fd: int, offset: int, length: int) -> None:
    """Have the disk begin to take these bytes of a file: sync_file_range(2)."""
    _checked(_libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE))


def read_directory(fd: int, room: int) -> bytes:
    """As many `struct linux_dirent64` as there is room for, empty at the end: getdents64(2)."""
    buffer = ctypes.create_string_buffer(room)
    length = _checked(_libc.getdents64(fd, buffer, room))
    return buffer.raw[:length]


def file_handle(fd: int, room: int) -> tuple[int, bytes]:
    """The kernel's handle of an open file, its type and bytes: name_to_handle_at(2).

    EOVERFLOW: it has more than `room` bytes. EOPNOTSUPP: its file system has none.
    """
    buffer = ctypes.create_string_buffer(_HANDLE.size + room)
    _HANDLE.pack_into(buffer, 0, room, 0)
    mount_id = ctypes.c_int()
    _checked(_libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount_id), _AT_EMPTY_PATH))
    length, kind = _HANDLE.unpack_from(buffer)
    return kind, buffer.raw[_HANDLE.size : _HANDLE.size + length]


def open_handle(mount: int, kind: int, handle: bytes, flags: int) -> int:
    """A descriptor of what a handle names, on the mount of a descriptor: open_by_handle_at(2)."""
    raw = _HANDLE.pack(len(handle), kind) + handle
    return _checked(_libc.open_by_handle_at(mount, raw, flags))


def is_allowed(fd: int, how: int) -> bool:
    """Whether this thread may do `how` (os.R_OK, W_OK, X_OK) with an open file: faccessat2(2)."""
    return not _libc.syscall(_FACCESSAT2, fd, b"", how, _AT_EACCESS | _AT_EMPTY_PATH)


def set_times(path: bytes, *times: int | None) -> None:
    """Access and modification, nanoseconds, NOW, or None to leave it: utimensat(2)."""
    numbers: list[int] = []
    for each in times:
        if each is None or each == NOW:
            numbers += 0, _UTIME_OMIT if each is None else _UTIME_NOW
        else:
            numbers += divmod(each, 10**9)
    _checked(_libc.utimensat(_AT_FDCWD, path, struct.pack("=4q", *numbers), 0))


def read_process(pid: int, local: int, pieces: int, remote: int, remote_pieces: int) -> int:
    """Copy memory of process `pid` here; how many bytes: process_vm_readv(2).

    `local` and `remote` are addresses of arrays of `struct iovec`, of so many pieces.
    """
    moved: int = _libc.process_vm_readv(pid, local, pieces, remote, remote_pieces, 0)
    return _checked(moved)


def write_process(pid: int, local: int, pieces: int, remote: int, remote_pieces: int) -> int:
    """The other way round: process_vm_writev(2)."""
    moved: int = _libc.process_vm_writev(pid, local, pieces, remote, remote_pieces, 0)
    return _checked(moved)


def peer_credentials(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end of a unix socket: SO_PEERCRED of unix(7)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
