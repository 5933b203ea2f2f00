"""Fills a disk that is mounted where nobody else sees it. A program of its own, for `disk.py`.

What it is given to unpack may be hostile. So it runs in a namespace of mounts, in which the host's
file systems are read-only and the disk has no devices, no setuid and no execution; and it goes into
the disk (chroot) before it touches what was unpacked.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

#: What is to be there, with nothing of another host; the guest's agent binds its own over them.
TEXTS = {
    "etc/hostname": "ratoon\n",
    "etc/hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    "etc/machine-id": "",
    "etc/resolv.conf": "nameserver 10.0.2.3\n",
}
#: Of this one the image's own stays, where it has one: the agent adds to it.
KEPT = "etc/hosts"
#: What the guest mounts on or writes to; not through links, which lead elsewhere before the disk is
#: its root. With their modes, where the image has none.
DIRECTORIES = {"proc": 0o555, "sys": 0o555, "dev": 0o755, "run": 0o755, "tmp": 0o1777}

# linux/mount.h, mount_setattr(2): Linux 5.12
_MOUNT_SETATTR = 442
_AT_RECURSIVE = 0x8000
_AT_FDCWD = -100
_MOUNT_ATTR_RDONLY = 1


def main(disk: str, place: str, *command: str) -> None:
    """Mount the image file `disk` on `place` beside it, and have `command` fill it."""
    room = str(Path(disk).parent)
    _set_read_only("/", True)
    # The one place that can be written to, besides the disk: the loop device opens its file there.
    subprocess.run(["mount", "--bind", room, room], check=True)
    _set_read_only(room, False)
    os.chdir(room)
    options = "loop,nodev,nosuid,noexec,noatime"
    subprocess.run(["mount", "-t", "ext4", "-o", options, disk, place], check=True)
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    outside = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chroot(place)
    os.chdir("/")
    furnish()
    os.fchdir(outside)
    os.chroot(".")
    os.close(outside)
    subprocess.run(["umount", place], check=True)


def furnish() -> None:
    """Put what a container runtime provides into the current root."""
    for name, mode in DIRECTORIES.items():
        if _own_directory(Path(name)):
            Path(name).chmod(mode)
    if not Path("etc").is_dir():
        _own_directory(Path("etc"))
    for name, text in TEXTS.items():
        if name == KEPT and Path(name).is_file():
            continue
        _remove(Path(name))
        with Path(name).open("x") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)


def _own_directory(path: Path) -> bool:
    """Have a directory there; whether it is new."""
    if path.is_dir() and not path.is_symlink():
        return False
    _remove(path)
    path.mkdir()
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _set_read_only(path: str, value: bool) -> None:
    """Of a mount: also of those below it, if it is to be."""
    own = _MOUNT_ATTR_RDONLY
    attributes = struct.pack("QQQQ", *((own, 0) if value else (0, own)), 0, 0)
    flags = _AT_RECURSIVE if value else 0
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (_AT_FDCWD, os.fsencode(path), flags, attributes, len(attributes))
    if libc.syscall(_MOUNT_SETATTR, *arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"mount_setattr: {os.strerror(number)}", path)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except subprocess.CalledProcessError as error:  # it has said why
        sys.exit(f"{error.cmd[0]} failed with exit code {error.returncode}")
    except OSError as error:
        sys.exit(str(error))
