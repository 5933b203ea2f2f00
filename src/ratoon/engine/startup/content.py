"""What a volume holds, in short: whether a start that has seen it may be used again."""

from __future__ import annotations

import os
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
    for name, entry in _below(directory, "", directory.stat().st_dev):
        status = entry.stat(follow_symlinks=False)
        fields = [status.st_mode, status.st_uid, status.st_gid]
        if not entry.is_dir(follow_symlinks=False):
            fields += [status.st_size, status.st_ctime_ns]
        hasher.update(os.fsencode(name) + b"\0" + repr(fields).encode() + b"\0")
        count += 1
    return f"{count} names, {hasher.hexdigest()[:_DIGITS]}"


def _below(directory: Path, prefix: str, device: int) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All below it, by names from there on, in one order. What vanishes meanwhile is left out."""
    try:
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda each: each.name)
    except FileNotFoundError:
        return
    for entry in entries:
        try:
            if entry.stat(follow_symlinks=False).st_dev != device:
                continue
        except FileNotFoundError:
            continue
        name = f"{prefix}/{entry.name}"
        yield name, entry
        if entry.is_dir(follow_symlinks=False):
            yield from _below(directory / entry.name, name, device)
