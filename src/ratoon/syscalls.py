"""System calls that Python has no functions for; each raises OSError, as its own do.

What the agent needs of these in a guest is in `guest/agent/libc.py`: it stands alone, as does
`sources/mounted.py`, a program that runs without this package.
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
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SYNC_FILE_RANGE_WRITE = 2
#: struct ucred: process, user, group.
_CREDENTIALS = struct.Struct("=iII")

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
