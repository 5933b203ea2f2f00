"""System calls that Python has no functions for; each raises OSError, as its own do.

Two have their own: the agent in a guest, which stands alone (`guest/agent/libc.py`), and
`volumes/callers.py`, with all that is a thread's own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from pathlib import Path

#: linux/sched.h
CLONE_FS, CLONE_FILES = 0x200, 0x400
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x4000000, 0x8000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWUSER = 0x20000000, 0x40000000, 0x10000000
#: linux/mount.h: of mount(2), then of mount_setattr(2).
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 1 << 18
MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
_MNT_DETACH, _OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 2, 1, 4
#: Numbers of system calls, of x86-64 and of those that all architectures share.
_SETGROUPS, _SETRESUID, _SETRESGID, _PIVOT_ROOT = 116, 117, 119, 155
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_LANDLOCK_CREATE_RULESET, _LANDLOCK_RESTRICT_SELF = 444, 446
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


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    _checked(_libc.mount(*words, ctypes.c_ulong(flags), None if data is None else data.encode()))


def detached_mount(fd: int, attributes: int) -> int:
    """A descriptor of a mount of its own, of what `fd` is open on: open_tree(2), mount_setattr(2).

    `attributes`: some of MOUNT_ATTR_RDONLY and its like.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH
    tree = _checked(_libc.syscall(_OPEN_TREE, fd, b"", flags))
    try:
        wanted = struct.pack("=4Q", attributes, 0, 0, 0)
        _checked(_libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, wanted, len(wanted)))
    except OSError:
        os.close(tree)
        raise
    return tree


def attach_mount(tree: int, target: str) -> None:
    """Put a detached mount somewhere, in the calling thread's namespace: move_mount(2).

    FileNotFoundError: what it is a mount of has no name any more.
    """
    path = target.encode()
    _checked(_libc.syscall(_MOVE_MOUNT, tree, b"", _AT_FDCWD, path, _MOVE_MOUNT_F_EMPTY_PATH))


def leave_root() -> None:
    """Make the working directory the root of this mount namespace, and what was that go away.

    pivot_root(2) as its page advises, umount2(2). The directory is where something is mounted.
    """
    _checked(_libc.syscall(_PIVOT_ROOT, b".", b"."))
    _checked(_libc.umount2(b".", _MNT_DETACH))


def prctl(option: int, *arguments: int) -> int:
    """prctl(2); of the calling thread alone, but for what belongs to its memory."""
    padded = (*arguments, 0, 0, 0, 0)[:4]
    return _checked(_libc.prctl(option, *map(ctypes.c_ulong, padded)))


def become(uid: int, gid: int) -> None:
    """Have the calling thread belong to these alone, for good, and to no other group.

    By the system calls, setgroups(2), setresgid(2) and setresuid(2): the library's functions of
    these names have all threads of the process do it.
    """
    _checked(_libc.syscall(_SETGROUPS, 0, None))
    _checked(_libc.syscall(_SETRESGID, gid, gid, gid))
    _checked(_libc.syscall(_SETRESUID, uid, uid, uid))


def landlock_version() -> int:
    """Which version of Landlock this kernel has, 0 if none: landlock_create_ruleset(2)."""
    found: int = _libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, 1)
    return max(found, 0)


def landlock(scoped: int) -> None:
    """Bar the calling thread, and what it starts, from those outside: landlock_restrict_self(2).

    `scoped`: bits of linux/landlock.h, from version 6 on. It has no new privileges already.
    """
    attributes = struct.pack("=3Q", 0, 0, scoped)
    call = (_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    rules = _checked(_libc.syscall(*call))
    try:
        _checked(_libc.syscall(_LANDLOCK_RESTRICT_SELF, rules, 0))
    finally:
        os.close(rules)


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


def file_handle(fd: int, room: int, name: bytes = b"") -> tuple[int, bytes]:
    """The kernel's handle of an open file, its type and bytes: name_to_handle_at(2).

    With a name, of what has it in that directory; of a link, the link's.

    EOVERFLOW: it has more than `room` bytes. EOPNOTSUPP: its file system has none.
    """
    buffer = ctypes.create_string_buffer(_HANDLE.size + room)
    _HANDLE.pack_into(buffer, 0, room, 0)
    mount_id = ctypes.c_int()
    flags = 0 if name else _AT_EMPTY_PATH
    _checked(_libc.name_to_handle_at(fd, name, buffer, ctypes.byref(mount_id), flags))
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
