"""Two directories change places at once: renameat2(2) with RENAME_EXCHANGE."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from ratoon.errors import HostError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
#: The kernel's and the file system's ways to say that they have no such thing.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}

_libc = ctypes.CDLL(None, use_errno=True)


def exchange(first: Path, second: Path) -> None:
    """Swap what the two paths name, on one file system; no instant sees one of them missing.

    HostError: the file system cannot (ext4, xfs, btrfs and tmpfs can). Is durable once both
    parent directories are flushed.
    """
    if not hasattr(_libc, "renameat2"):  # a libc without it
        raise HostError(f"cannot replace {second} at once on this host; delete it first")
    old, new = os.fsencode(first), os.fsencode(second)
    if _libc.renameat2(_AT_FDCWD, old, _AT_FDCWD, new, _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        raise HostError(f"the file system cannot replace {second} at once; delete it first")
    raise OSError(code, os.strerror(code), str(first), None, str(second))
