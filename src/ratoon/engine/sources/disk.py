"""Root disks: an ext4 of a given size, filled by a program that may be fooled, as qcow2."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from ratoon.artifacts import run
from ratoon.engine.sources import mounted
from ratoon.errors import HostError, InvalidInput
from ratoon.units import MIB

#: Nothing is left for the guest's kernel to initialise later: every fork would do it again.
FILE_SYSTEM = ("-t", "ext4", "-L", "ratoon", "-E", "lazy_itable_init=0,lazy_journal_init=0")
#: Killed together with the thread that waits for it; the namespaces, and with them the mount and
#: its loop device, end with the last process in them. What the host unmounts goes in them too.
_ALONE = (
    *("setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--propagation=slave"),
    *("--pid", "--fork", "--kill-child"),
)


def fill_disk(room: Path, disk_bytes: int, name: str, command: Sequence[str | Path]) -> Path:
    """`disk.qcow2` in the directory `room`, with what `command` puts into the directory `root`.

    It runs in `room`. What it writes can neither leave the disk nor outgrow it. InvalidInput: the
    disk is too small for image `name`. HostError: the command failed, or the disk's mount.
    """
    raw, root, disk = room / "disk.raw", room / "root", room / "disk.qcow2"
    raw.touch(mode=0o600)
    os.truncate(raw, disk_bytes)
    run(["mke2fs", "-q", "-F", *FILE_SYSTEM, raw])
    root.mkdir()
    helper = [sys.executable, "-I", "-S", "-B", mounted.__file__]
    try:
        run([*_ALONE, *helper, raw, root, *command], cwd=room)
    except HostError as error:
        if "no space left on device" in str(error).lower() and _has_room(room):
            raise too_large(name, disk_bytes) from None
        _, _, reason = str(error).partition("\n")
        raise HostError(f"image {name} was not unpacked: {reason or error}") from None
    run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk])
    disk.chmod(0o600)  # the image may be private
    raw.unlink()
    root.rmdir()
    shutil.rmtree(room / "layout", ignore_errors=True)
    return disk


def too_large(name: str, disk_bytes: int) -> InvalidInput:
    """What to say of an image that the disk cannot hold."""
    return InvalidInput(
        f"image {name} does not fit on a disk of {disk_bytes // MIB} MiB; "
        "give it a larger one (--disk-size-mib)"
    )


def _has_room(place: Path) -> bool:
    """Whether the host's own file system is not what is full."""
    return os.statvfs(place).f_bavail * os.statvfs(place).f_frsize > 16 * MIB
