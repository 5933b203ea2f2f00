"""An initramfs as the kernel reads it: Documentation/driver-api/early-userspace/buffer-format.rst.

Of the same tree the same bytes come, whoever has made it: owners, times, and what an umask takes
from modes are left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

_MAGIC, _ALIGNMENT = b"070701", 4
_LAST = "TRAILER!!!"


def archive(root: Path) -> bytes:
    """All that is below `root`, in the form "newc", of root's; directories, files and links."""
    content = bytearray()
    numbers: dict[int, int] = {}
    for path in walk(root):
        status = path.lstat()
        seen = status.st_ino in numbers
        number = numbers.setdefault(status.st_ino, len(numbers) + 1)
        if stat.S_ISLNK(status.st_mode):
            data = os.fsencode(path.readlink())
        else:  # of a file with several names the first one has what is in it
            data = b"" if seen or stat.S_ISDIR(status.st_mode) else path.read_bytes()
        links = 1 if stat.S_ISDIR(status.st_mode) else status.st_nlink
        name = str(path.relative_to(root))
        content += _entry(name, data, number, _mode(status.st_mode), links)
    return bytes(content + _entry(_LAST, b"", 0, 0, 1))


def walk(root: Path) -> Iterator[Path]:
    """Everything below `root`, directories before what is in them, in a fixed order."""
    for path in sorted(root.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from walk(path)


def _mode(mode: int) -> int:
    """What may be run or entered is for all, and so is what may be read."""
    return stat.S_IFMT(mode) | (0o755 if mode & stat.S_IXUSR else 0o644)


def _entry(name: str, data: bytes, number: int, mode: int, links: int) -> bytes:
    """Inode, mode, uid, gid, links, time, size, devices, length of the name, no checksum."""
    raw = os.fsencode(name) + b"\0"
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + raw) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)
