"""What a volume holds, in short: whether a start that has seen it may be used again."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

#: Hex digits of the digest, which need be right by accident only.
_DIGITS = 32


def describe_content(directory: Path) -> str:
    """How much is below it, and a digest that is another one if any of it has changed; blocks.

    Of each thing there count its name, kind, mode and owner; of what is no directory also its size
    and when it was last changed (ctime, which cannot be set back). Contents are not read, and other
    file systems within it not looked at. OSError names what cannot be looked at.
    """
    hasher = blake3()
    count = 0
    for path, status in _below(directory, directory.stat().st_dev):
        fields = [status.st_mode, status.st_uid, status.st_gid]
        if not stat.S_ISDIR(status.st_mode):
            fields += [status.st_size, status.st_ctime_ns]
        hasher.update(repr((os.fsencode(path.relative_to(directory)), fields)).encode())
        count += 1
    return f"{count} names, {hasher.hexdigest()[:_DIGITS]}"


def _below(directory: Path, device: int) -> Iterator[tuple[Path, os.stat_result]]:
    """All below it, in one order. What vanishes meanwhile is left out."""
    try:
        paths = sorted(directory.iterdir())
    except FileNotFoundError:
        return
    for path in paths:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        if status.st_dev == device:
            yield path, status
            if stat.S_ISDIR(status.st_mode):
                yield from _below(path, device)
