"""Which parts of a file's data other files share with it (reflinks), as the file system tells.

FIEMAP: Documentation/filesystems/fiemap.rst and include/uapi/linux/fiemap.h of the kernel.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_FIEMAP = 3 << 30 | 32 << 16 | ord("f") << 8 | 11  # _IOWR('f', 11, struct fiemap)
#: start, length, flags, mapped extents, extent count
_HEADER = struct.Struct("=QQIIII")
#: logical, physical, length, flags
_EXTENT = struct.Struct("=QQQ16xI12x")
_BATCH = 512
_LAST, _UNKNOWN, _SHARED = 0x1, 0x2, 0x2000


def shared_extents(path: Path) -> list[tuple[int, int]]:
    """Where on its device the shared data of a regular file lies: (start, end) in bytes.

    Empty where the file system shares nothing or cannot tell. OSError: it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return _ask(fd)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
            return []
        raise
    finally:
        os.close(fd)


def _ask(fd: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    start = 0
    buffer = bytearray(_HEADER.size + _BATCH * _EXTENT.size)
    while True:
        _HEADER.pack_into(buffer, 0, start, (1 << 64) - 1 - start, 0, 0, _BATCH, 0)
        fcntl.ioctl(fd, _FIEMAP, buffer)
        count = _HEADER.unpack_from(buffer)[3]
        flags = _LAST
        for number in range(count):
            logical, physical, length, flags = _EXTENT.unpack_from(
                buffer, _HEADER.size + number * _EXTENT.size
            )
            start = logical + length
            if flags & _SHARED and not flags & _UNKNOWN:
                found.append((physical, physical + length))
        if flags & _LAST:
            return found
