"""Runs a program as an ordinary user of this host, one who need not be there.

A program of its own, run by root: `ordinary_user.py UID HOME LENT -- PROGRAM ARGUMENT…`, with the
environment of who runs it. In a mount namespace that ends with the program the user exists, has
LENT subordinate ids after his own, comes to this Python, the tests, what is tested and the cache,
wherever they lie, and may open /dev/net/tun, as udev has it.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

from ratoon import paths, syscalls
from ratoon.syscalls import CLONE_NEWNS, MS_BIND, MS_PRIVATE, MS_REC

NAME = "ordinary"


def main() -> None:
    uid, (home, lent, _, *argv) = int(sys.argv[1]), sys.argv[2:]
    appear(uid, home, int(lent))
    become(uid)
    os.chdir("/")
    os.execvp(argv[0], argv)


def appear(uid: int, home: str, lent: int) -> None:
    """Have this process, and what it starts, find the user on the host."""
    syscalls.unshare(CLONE_NEWNS)
    syscalls.mount("none", "/", None, MS_REC | MS_PRIVATE)
    reveal([Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[1], paths.cache()])
    passwd = Path("/etc/passwd").read_text()
    replace("passwd", f"{passwd}{NAME}:x:{uid}:{uid}::{home}:/bin/sh\n")
    for file in ("subuid", "subgid"):
        replace(file, f"{NAME}:{uid + 1}:{lent}\n" if lent else "")
    lend_tun()


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def reveal(paths: list[Path]) -> None:
    """Have users come to these, past directories that are for root alone."""
    trees = []
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        trees.append((path, syscalls.detached_mount(fd, 0)))
    for path, tree in trees:
        for above in reversed(path.parents):
            if above.exists() and not above.stat().st_mode & 0o001:
                syscalls.mount("none", str(above), "tmpfs", 0, "mode=755")
        path.mkdir(parents=True, exist_ok=True)
        syscalls.attach_mount(tree, str(path))


def replace(name: str, text: str) -> None:
    """What a file of /etc says to this program and what it starts."""
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(text)
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        target = Path("/etc", name)
        if not target.exists():
            target.touch()
        syscalls.mount(file.name, str(target), None, MS_BIND)


def lend_tun() -> None:
    target = Path("/dev/net/tun")
    device = Path(f"/dev/tun-{os.getpid()}")
    os.mknod(device, stat.S_IFCHR, target.stat().st_rdev)
    try:
        device.chmod(0o666)
        syscalls.mount(str(device), str(target), None, MS_BIND)
    finally:
        device.unlink()


if __name__ == "__main__":
    main()
