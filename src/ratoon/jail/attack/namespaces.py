"""New namespaces, those of others, and mounts."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from ratoon.jail.attack.around import foreign_pids, fresh, opens, writable_places
from ratoon.jail.attack.attempts import Denied, attempt, past_permission, register, try_each
from ratoon.jail.attack.calls import AT_FDCWD, O_PATH, buffer, call, close_later
from ratoon.jail.attack.processes import pidfd
from ratoon.jail.attack.targets import MAIN_PARENT, MAIN_PID, T

NEW = {
    "mount": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000,
    "user": 0x10000000, "pid": 0x20000000, "network": 0x40000000, "time": 0x00000080,
}  # fmt: skip


def clone_into_new(flag: int) -> str:
    return made(lambda: call("clone", flag | signal.SIGCHLD, 0, 0, 0, 0))


def clone3_into_new(flag: int) -> str:
    arguments = buffer(struct.pack("=8Q", flag, 0, 0, 0, signal.SIGCHLD, 0, 0, 0))
    return made(lambda: call("clone3", arguments, 64))


def made(clone: Callable[[], int]) -> str:
    pid = clone()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "a process in it was made"


for _kind, _flag in NEW.items():
    register(
        "namespaces",
        f"unshare: a new {_kind} namespace",
        lambda flag=_flag: f"returned {call('unshare', flag)}",  # type: ignore[misc]
        True,
    )
    if _kind != "time":  # clone takes that bit for a signal; clone3 below does not
        register(
            "namespaces",
            f"clone: a new {_kind} namespace",
            lambda flag=_flag: clone_into_new(flag),  # type: ignore[misc]
        )


@attempt("namespaces", "clone3: a new namespace of any kind")
def _() -> str:
    return try_each(NEW, lambda kind: clone3_into_new(NEW[kind]))


@attempt("namespaces", "clone3: a new user namespace with every other kind")
def _() -> str:
    return clone3_into_new(sum(NEW.values()))


@attempt("namespaces", "become root in a user namespace and mount", sticky=True)
def _() -> str:
    call("unshare", NEW["user"] | NEW["mount"])
    call("mount", b"none", b"/", None, 0x44000, None)
    return try_each(
        ["tmpfs", "proc", "sysfs", "devpts", "overlay", "fuse"],
        lambda kind: str(call("mount", b"none", b"/", kind.encode(), 0, None)),
    )


@attempt("namespaces", "write a user map for itself", sticky=True)
def _() -> str:
    uid = os.getuid()
    call("unshare", NEW["user"])
    with open("/proc/self/uid_map", "w", encoding="ascii") as file:
        file.write(f"0 {uid} 1")
    return f"now uid {os.getuid()}"


@attempt("namespaces", "configure a network of its own", sticky=True)
def _() -> str:
    call("unshare", NEW["user"] | NEW["network"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sH22x", b"lo", 1))
    return "loopback was brought up"


def first_and_foreign() -> list[int]:
    return foreign_pids() + ([] if MAIN_PID == 1 else [1])


@attempt("namespaces", "join the namespaces of others through pidfd", sticky=True)
def _() -> str:
    pairs = [(pid, kind) for pid in first_and_foreign() for kind in NEW]
    return try_each(pairs, lambda pair: str(call("setns", pidfd(pair[0]), NEW[pair[1]])))


@attempt("namespaces", "join the namespaces of others through /proc", sticky=True)
def _() -> str:
    def one(path: str) -> str:
        fd = os.open(path, os.O_RDONLY)
        return str(call("setns", fd, 0))

    kinds = ("mnt", "user", "net", "pid", "ipc", "uts", "cgroup")
    pids = [*first_and_foreign(), MAIN_PARENT]
    return try_each([f"/proc/{pid}/ns/{kind}" for pid in pids for kind in kinds], one)


@attempt("namespaces", "ask for the owning or parent namespace (NS_GET_PARENT)")
def _() -> str:
    def one(pair: tuple[str, int]) -> str:
        fd = os.open(f"/proc/self/ns/{pair[0]}", os.O_RDONLY)
        return close_later(fcntl.ioctl(fd, pair[1]))

    return try_each([(k, r) for k in ("mnt", "user", "pid", "net") for r in (0xB701, 0xB702)], one)


def mounting(name: str, make: Callable[[], Any], *later: int) -> None:
    register("namespaces", name, lambda: past_permission(make, *later), True)


mounting(
    "mount a file system",
    lambda: call("mount", b"none", b"/", b"no-such-type", 0, None),
    errno.ENODEV,
)
mounting(
    "bind-mount a directory",
    lambda: call("mount", b"/no-such-place", b"/", None, 0x1000, None),
    errno.ENOENT,
)
mounting(
    "remount the root (mount_setattr)",
    lambda: call("mount_setattr", AT_FDCWD, b"/", 0, buffer(32), 32),
)
mounting(
    "unmount the root",
    lambda: call("umount2", b"/", 4),
    errno.EINVAL,
    errno.EBUSY,
    errno.EAGAIN,
)
mounting("pivot_root", lambda: call("pivot_root", b"/no-such", b"/no-such"), errno.ENOENT)
mounting("move_mount", lambda: call("move_mount", -1, b"", -1, b"", 4), errno.EBADF)
mounting("copy a mount (open_tree)", lambda: call("open_tree", AT_FDCWD, b"/", 0x8001))
mounting("pick a mount to change (fspick)", lambda: call("fspick", AT_FDCWD, b"/", 0))
mounting("chroot", lambda: os.chroot("/"))


@attempt("namespaces", "make a file system with fsopen and fsmount", sticky=True)
def _() -> str:
    def one(kind: bytes) -> str:
        context = call("fsopen", kind, 0)
        call("fsconfig", context, 6, None, None, 0)
        return close_later(call("fsmount", context, 0, 0))

    return try_each([b"tmpfs", b"proc", b"sysfs", b"mqueue"], one)


@attempt("namespaces", "leave the root with a double chroot", sticky=True)
def _() -> str:
    root = os.open("/", os.O_RDONLY)
    before = os.stat("/").st_ino
    os.chroot(os.path.dirname(sys.executable))
    os.fchdir(root)
    for _step in range(64):
        os.chdir("..")
    os.chroot(".")
    return f"chroot worked; the root's inode was {before}, is {os.stat('/').st_ino}"


@attempt("namespaces", "leave the root with .. and an unlinked directory", sticky=True)
def _() -> str:
    def one(place: str) -> str:
        path = fresh(place)
        os.mkdir(path)
        os.chdir(path)
        os.rmdir(path)
        return opens("../" * 40 + T.host_paths[0].lstrip("/"), O_PATH)

    if not T.host_paths:
        raise Denied("not tried: no path was named")
    return try_each(writable_places(), one)


@attempt("namespaces", "list mounts it should not see (listmount of other namespaces)")
def _() -> str:
    found = buffer(8 * 64)

    def one(space: int) -> str:
        request = buffer(struct.pack("=IIQQQ", 32, 0, 2**64 - 1, 0, space))
        return f"{call('listmount', request, found, 64, 0)} mounts"

    return try_each(range(1, 64), one)  # the first numbers are the initial namespaces
