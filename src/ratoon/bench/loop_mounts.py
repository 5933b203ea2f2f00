"""File systems of their own kind, each made in a sparse file and mounted by a loop device."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratoon.errors import HostError

#: The kinds that are of interest, and the Debian packages that can make them.
KINDS = {"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}

_QUIET = {"ext4": ("-q", "-F"), "xfs": ("-q", "-f"), "btrfs": ("-q", "-f")}
#: Seconds until a file system that was in use is let go.
_BUSY_TIMEOUT = 10.0


def what_is_missing(kind: str) -> str | None:
    """Why no file system of `kind` can be made and mounted here, None if it can."""
    if os.geteuid() != 0:
        return "only root can mount file systems"
    if not Path("/dev/loop-control").exists():
        return "there is no /dev/loop-control: no loop devices"
    if shutil.which(f"mkfs.{kind}") is None:
        return f"there is no mkfs.{kind}: install {KINDS[kind]}"
    return None


@contextmanager
def mounted(kind: str, size: int) -> Iterator[Path]:
    """The root of a new file system of `size` bytes; unmounted, and gone, on leaving.

    HostError: it cannot be made or mounted, and why.
    """
    if missing := what_is_missing(kind):
        raise HostError(f"no {kind} here: {missing}")
    with tempfile.TemporaryDirectory(prefix=f"ratoon-{kind}-") as name:
        file, root = Path(name, "file"), Path(name, "root")
        with file.open("xb") as sparse:
            sparse.truncate(size)
        root.mkdir()
        _run(f"mkfs.{kind}", *_QUIET[kind], str(file))
        # The kernel frees the loop device that `mount` takes as soon as it is unmounted.
        _run("mount", "-t", kind, "-o", "loop", str(file), str(root))
        try:
            yield root
        finally:
            _unmount(root)


def used_bytes(root: Path) -> int:
    """Bytes in use on a file system, its own records included, once all is written."""
    _run("sync", "--file-system", str(root))
    status = os.statvfs(root)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _unmount(root: Path) -> None:
    deadline = time.monotonic() + _BUSY_TIMEOUT
    while subprocess.run(["umount", root], capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            # Goes once nobody uses it any more. To wait longer would not tell who does.
            _run("umount", "--lazy", str(root))
            raise HostError(f"{root} is still in use")
        time.sleep(0.05)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
