"""What several attempts look for: other processes, places to write, interfaces."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import socket
import struct
import sys
import time
from collections.abc import Callable

from ratoon.jail.attack.attempts import Denied, try_each
from ratoon.jail.attack.calls import LIBC, close_later
from ratoon.jail.attack.targets import MAIN_PID, T


def foreign_pids() -> list[int]:
    return [pid for pid in T.pids if pid not in (os.getpid(), MAIN_PID)]


def for_pids(one: Callable[[int], str | None]) -> str:
    return try_each(foreign_pids(), one)


@functools.cache
def other_processes() -> dict[int, bool]:
    """Process numbers seen besides our own and process 1, and whether a signal could be sent."""
    seen: dict[int, bool] = {}
    known = {os.getpid(), MAIN_PID, 1}
    near = {pid + step for pid in T.pids + [os.getpid()] for step in range(-300, 300)}
    send = LIBC.kill
    for pid in list(range(2, 40_000)) + sorted(p for p in near if p >= 40_000):
        if pid in known:
            continue
        if send(pid, 0) == 0:
            seen[pid] = True
        elif ctypes.get_errno() == errno.EPERM:
            seen[pid] = False
    return seen


def require_others() -> None:
    """Some calls always find our own processes; they matter only if there are others."""
    if not other_processes():
        raise Denied("only our own processes are there")


def writable_places() -> list[str]:
    places = ["/", ".", "/tmp", "/var/tmp", "/dev/shm", "/dev", "/run", "/etc", "/root", "/home"]
    places += ["/proc", "/sys", "/var/lib", "/var/run", "/mnt", "/opt"]
    places += [os.path.dirname(sys.executable), os.path.dirname(os.__file__)]
    places += [os.path.dirname(path) for path in T.host_paths + T.unix_sockets]
    return list(dict.fromkeys(place for place in places if place))


def fresh(place: str) -> str:
    return os.path.join(place, f".standin-{os.getpid()}-{time.monotonic_ns() % 10**9}")


def interfaces() -> list[str]:
    """Names of the network interfaces other than loopback."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for index in range(1, 40):
            try:
                answer = fcntl.ioctl(probe, 0x8910, struct.pack("16si20x", b"", index))
            except OSError:
                continue
            name = answer[:16].split(b"\0")[0].decode()
            if name != "lo":
                found.append(name)
    return found


def opens(path: str, flags: int, dir_fd: int | None = None) -> str:
    return close_later(os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=dir_fd))


def first_bytes(path: str, size: int = 64) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        data = os.read(fd, size)
    finally:
        os.close(fd)
    if not data:
        raise Denied("empty")
    return f"{len(data)} bytes"
