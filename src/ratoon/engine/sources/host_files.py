"""A kernel and a root disk that somebody has: taken from where they may lie, and from nowhere else.

Who names them may be somebody else than who runs this, and could name any file of the host. So they
are regular files below one of the directories that were chosen for it, whatever links lead there;
and the disk is read as raw, so that nothing in it can name another file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ratoon import files
from ratoon.errors import InvalidInput
from ratoon.store.disk.flatten import from_raw

#: A guest's file systems are made of these.
BLOCK = 4096


@dataclass(frozen=True)
class Given:
    """Copies of what was given, and the disk's size in bytes as the guest will see it."""

    kernel: Path
    disk: Path
    disk_bytes: int


def take(kernel: Path, rootfs: Path, roots: Sequence[Path], room: Path) -> Given:
    """Copy both to the directory `room`, the disk as qcow2; blocks.

    InvalidInput: they are not regular files below one of `roots`, or `rootfs` can be no disk.
    """
    ours = room / "vmlinuz"
    with _opened(kernel, roots) as path:
        files.copy_sparse(path, ours)
    with _opened(rootfs, roots) as path:
        size = path.stat().st_size
        if not size or size % BLOCK:
            raise InvalidInput(f"{rootfs} has {size} bytes: a raw disk has a multiple of {BLOCK}")
        disk = room / "disk.qcow2"
        raw = room / "disk.raw"
        files.copy_sparse(path, raw)
    from_raw(raw, disk)
    raw.unlink()
    return Given(ours, disk, size)


@contextmanager
def _opened(path: Path, roots: Sequence[Path]) -> Iterator[Path]:
    if not roots:
        raise InvalidInput(f"{path}: no files of this host are taken; see `serve --image-root`")
    with held(path, roots) as name:
        yield name


@contextmanager
def held(path: Path, roots: Sequence[Path] | None, *, directory: bool = False) -> Iterator[Path]:
    """A name for the file or directory `path`, also for other processes, while it is held open.

    InvalidInput: it is not below one of `roots` (None: wherever it is), or of another kind.
    """
    kind, flag = ("directory", os.O_DIRECTORY) if directory else ("regular file", 0)
    is_one = stat.S_ISDIR if directory else stat.S_ISREG
    try:
        real = path.resolve(strict=True)
        if roots is not None and not any(real.is_relative_to(root.resolve()) for root in roots):
            places = " or ".join(str(root) for root in roots) or "any directory that was chosen"
            raise InvalidInput(f"{path} is not below {places}; see `serve --image-root`")
        if not is_one(real.lstat().st_mode):
            raise InvalidInput(f"{path} is not a {kind}")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(real, flags | flag)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{path} cannot be read: {_reason(error)}") from None
    try:
        name = Path(f"/proc/{os.getpid()}/fd/{fd}")
        if name.readlink() != real or not is_one(os.fstat(fd).st_mode):
            raise InvalidInput(f"{path} was replaced meanwhile")
        yield name
    finally:
        os.close(fd)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
