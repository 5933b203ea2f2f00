"""Who asks, and how a thread takes on his rights, so that the kernel decides what he may.

The user and group that files are used by are a thread's own, as its supplementary groups are; only
glibc's `setgroups` sets those of all threads, so the system is called past it. A user who is not
root has none of the capabilities over files, whatever else the thread has (capabilities(7)).

In a user namespace the ids are its own: whoever has none there cannot be acted for, and is refused.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from ratoon.jail.user_namespace import is_root_of_all

#: They do not block, and keep the interpreter's lock: to give it up takes longer than they do.
_libc = ctypes.PyDLL(None, use_errno=True)
for _function in (_libc.setfsuid, _libc.setfsgid):
    _function.argtypes, _function.restype = [ctypes.c_uint], ctypes.c_uint
_SETGROUPS = 116
#: What is no id: nothing is set, and the answer is what is.
_NONE = (1 << 32) - 1
_CLONE_FS = 0x200
#: struct __user_cap_header_struct, and of __user_cap_data_struct two (capget(2)).
_CAP_HEADER, _CAP_DATA = struct.pack("=Ii", 0x20080522, 0), struct.Struct("=6I")
_CAP_SYS_RESOURCE = 24


@dataclass(frozen=True)
class Caller:
    """Who asks, as the guest's kernel says."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


NOBODY = Caller(65534, 65534)


def acting() -> int:
    """The user by whom this thread uses files."""
    return int(_libc.setfsuid(_NONE))


@contextmanager
def acting_as(caller: Caller) -> Iterator[None]:
    """Within the block this thread, and no other, uses files as the caller.

    Afterwards it is root again, but keeps group and groups: to root they make no difference, and to
    set them takes long. PermissionError: the system does not let it.
    """
    if caller.uid and list(caller.groups) != os.getgroups():
        array = (ctypes.c_uint * len(caller.groups))(*caller.groups)
        if _libc.syscall(_SETGROUPS, len(array), array) < 0:
            raise PermissionError(errno.EACCES, "these groups cannot be had")
    _set(_libc.setfsgid, caller.gid)
    with _user(caller.uid):
        yield


def as_root() -> AbstractContextManager[None]:
    """Within the block of a caller, all rights: for what NFS grants him and the kernel does not."""
    return _user(0)


@contextmanager
def _user(uid: int) -> Iterator[None]:
    before = _set(_libc.setfsuid, uid)
    try:
        yield
    finally:
        # Should this fail, the thread has fewer rights than it should, and never more.
        _set(_libc.setfsuid, before)


def _set(function: Callable[[int], int], wanted: int) -> int:
    """Set an id, and return what it was. Neither function says whether it has done it."""
    before = function(wanted)
    if before != wanted and function(_NONE) != wanted:
        raise PermissionError(errno.EACCES, f"no id {wanted} can be had")
    return before


def require() -> None:
    """OSError: this process is root, and cannot act for others."""
    if not is_root_of_all():
        return

    def attempt() -> None:
        prepare_thread()
        with acting_as(NOBODY):
            pass

    with ThreadPoolExecutor(1) as own:
        own.submit(attempt).result()


def prepare_thread() -> None:
    """Make this thread one that acts for others, for as long as it lives.

    It has no umask, for the callers have applied theirs; no groups of the host, if it can be
    without; and not the one capability over files that `setfsuid` leaves, so quotas and what is
    reserved on a disk hold.
    """
    if _libc.unshare(_CLONE_FS) < 0:
        raise OSError(ctypes.get_errno(), "a thread cannot have an umask of its own")
    os.umask(0)
    _libc.syscall(_SETGROUPS, 0, None)
    data = ctypes.create_string_buffer(_CAP_DATA.size)
    _libc.capget(_CAP_HEADER, data)
    effective, *others = _CAP_DATA.unpack(data.raw)
    _libc.capset(_CAP_HEADER, _CAP_DATA.pack(effective & ~(1 << _CAP_SYS_RESOURCE), *others))
