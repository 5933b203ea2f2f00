"""What any process may do, and what the honest one needs: it tells that attempts work at all."""

from __future__ import annotations

import _thread
import ctypes
import mmap
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from ratoon.jail.attack.around import first_bytes, opens
from ratoon.jail.attack.attempts import Denied, attempt, register, try_each
from ratoon.jail.attack.calls import (
    HANG_SECONDS,
    MIB,
    address,
    buffer,
    call,
    close_later,
    filled,
    in_child,
    map_raw,
    raise_status,
)
from ratoon.jail.attack.descriptors import lock_range, punch_hole, same_length
from ratoon.jail.attack.held_sockets import held_sockets
from ratoon.jail.attack.processes import pidfd, ptrace
from ratoon.jail.attack.sockets import NETLINK
from ratoon.jail.attack.targets import T, as_list


@attempt("own", "fork a child")
def _() -> str:
    return raise_status(in_child(lambda: None))


@attempt("own", "kill its own child")
def _() -> str:
    pid = os.fork()
    if pid == 0:
        time.sleep(HANG_SECONDS)
        os._exit(0)
    os.kill(pid, signal.SIGKILL)
    return f"it ended by signal {os.WTERMSIG(os.waitpid(pid, 0)[1])}"


@attempt("own", "trace its own child")
def _() -> str:
    pid = os.fork()
    if pid == 0:
        time.sleep(HANG_SECONDS)
        os._exit(0)
    try:
        return f"PTRACE_SEIZE {ptrace(0x4206, pid)}"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@attempt("own", "make a thread")
def _() -> str:
    done: list[int] = []
    try:
        _thread.start_new_thread(lambda: done.append(1), ())
    except RuntimeError as error:
        raise Denied(str(error)) from error
    end = time.monotonic() + 1
    while not done and time.monotonic() < end:
        time.sleep(0.001)
    if not done:
        raise Denied("it did not run")
    return "it ran"


@attempt("own", "use processor time")
def _() -> str:
    begin = time.process_time()
    while time.process_time() - begin < 0.02:
        pass
    return "20 ms"


@attempt("own", "use memory (16 MiB, anonymous)")
def _() -> str:
    with mmap.mmap(-1, 16 * MIB) as area:
        for place in range(0, 16 * MIB, 4096):
            area[place] = 1
    return "16 MiB"


@attempt("own", "make a file in memory (memfd)")
def _() -> str:
    return close_later(os.memfd_create("own"))


@attempt("own", "share memory with its own child")
def _() -> str:
    with mmap.mmap(-1, 4096) as area:
        raise_status(in_child(lambda: area.__setitem__(0, 7)))
        return f"saw {area[0]}"


@attempt("own", "map memory writable and executable at once")
def _() -> str:
    map_raw(-1, 7, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return "mapped"


@attempt("own", "make written memory executable (mprotect)")
def _() -> str:
    where = map_raw(-1, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ctypes.memset(where, 0xC3, 16)
    return f"returned {call('mprotect', where, 4096, 5)}"


@attempt("own", "map a file in memory executable")
def _() -> str:
    map_raw(filled(b"\xc3" * 4096), 5, mmap.MAP_PRIVATE)
    return "mapped"


@attempt("own", "read the memory image by its path")
def _() -> str:
    return try_each(as_list(T.memory), first_bytes)


@attempt("own", "map the memory image privately")
def _() -> str:
    def one(path: str) -> str:
        fd = os.open(path, os.O_RDONLY)
        map_raw(fd, 3, mmap.MAP_PRIVATE)
        return "mapped"

    return try_each(as_list(T.memory), one)


@attempt("own", "read its layers")
def _() -> str:
    return try_each(T.layers, lambda fd: f"{len(os.pread(fd, 512, 0))} bytes")


@attempt("own", "reopen its layers for reading through /proc/self/fd")
def _() -> str:
    return try_each(T.layers, lambda fd: opens(f"/proc/self/fd/{fd}", os.O_RDONLY))


@attempt("own", "read its overlay")
def _() -> str:
    return try_each(T.overlay, lambda fd: f"{len(os.pread(fd, 512, 0))} bytes")


@attempt("own", "write its overlay")
def _() -> str:
    def one(fd: int) -> str:
        data = os.pread(fd, 16, 0)
        if data:
            return f"{os.pwrite(fd, data, 0)} bytes (those that were there)"
        os.pwrite(fd, b"\0", 0)
        os.ftruncate(fd, 0)
        return "1 byte, taken back"

    return try_each(T.overlay, one)


@attempt("own", "change the length of its overlay")
def _() -> str:
    return try_each(T.overlay, same_length)


@attempt("own", "punch holes in its overlay")
def _() -> str:
    return try_each(T.overlay, punch_hole)


@attempt("own", "lock its overlay")
def _() -> str:
    return try_each(T.overlay, lock_range)


@attempt("own", "force its overlay to disk")
def _() -> str:
    return try_each(T.overlay, os.fdatasync)


@attempt("own", "write to its console and log")
def _() -> str:
    return try_each(T.traces, lambda fd: f"{os.write(fd, bytes(1))} byte")


@attempt("own", "read back its console and log")
def _() -> str:
    return try_each(T.traces, lambda fd: f"{len(os.pread(fd, 512, 0))} bytes")


@attempt("own", "wait for a connection on its sockets")
def _() -> str:
    def one(held: socket.socket) -> str:
        if not held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return f"it is connected: {held.getpeername()!r}"
        held.setblocking(False)
        try:
            held.accept()[0].close()
        except BlockingIOError:
            return "accept would wait"
        return "accepted one"

    return held_sockets(one)


@attempt("own", "make a pair of unix sockets, and pass a descriptor over it")
def _() -> str:
    here, there = socket.socketpair()
    socket.send_fds(here, [b"x"], [here.fileno()])
    return close_later(socket.recv_fds(there, 1, 1)[1][0])


def plain(name: str, run: Callable[[], Any], sticky: bool = False) -> None:
    register("own", name, lambda: f"returned {run()}"[:80], sticky)


def read_itself() -> bytes:
    source, copy = buffer(b"itself"), buffer(6)
    here = buffer(struct.pack("=QQ", address(copy), 6))
    there = buffer(struct.pack("=QQ", address(source), 6))
    call("process_vm_readv", os.getpid(), here, 1, there, 1, 0)
    return copy.raw  # type: ignore[no-any-return]


plain("make a unix socket", lambda: socket.socket(socket.AF_UNIX).close())
plain("make an IPv4 socket", lambda: socket.socket(socket.AF_INET).close())
plain("make an IPv6 socket", lambda: socket.socket(socket.AF_INET6).close())
plain("make a route netlink socket", lambda: socket.socket(NETLINK, socket.SOCK_RAW, 0).close())
plain("make a pipe", os.pipe)
plain("make an eventfd", lambda: call(290, 0, 0))
plain("make an epoll set", lambda: call(291, 0))
plain("make a timerfd", lambda: call(283, 1, 0))
plain("make a signalfd", lambda: call(289, -1, buffer(8), 8, 0))
plain("make a context for Linux AIO (io_setup)", lambda: call("io_setup", 8, buffer(8)))
plain("open a pidfd of itself", lambda: close_later(pidfd(os.getpid())))
plain("signal itself", lambda: os.kill(os.getpid(), 0))
plain("read its own memory (process_vm_readv)", read_itself)
plain("read the time", time.time)
plain("get random bytes", lambda: len(os.urandom(8)))
plain("see the kernel's name and the host's name (uname)", lambda: " ".join(os.uname()))
plain("see the load of the machine (sysinfo)", lambda: call(99, buffer(128)))
plain("see its user and groups", lambda: (os.getresuid(), os.getresgid(), os.getgroups()))
plain("list its root directory", lambda: sorted(os.listdir("/"))[:12])
plain("read its own state in /proc", lambda: first_bytes("/proc/self/status"))
plain("open /dev/null", lambda: opens("/dev/null", os.O_RDWR))
plain("see the size of its file systems", lambda: os.statvfs("/").f_blocks)
plain("name itself", lambda: call("prctl", 15, b"standin", 0, 0, 0))
plain("lower its own priority", lambda: os.nice(1), True)
plain("start a session of its own", os.setsid, True)
plain("lower its own limits", lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)), True)
plain("make itself dumpable", lambda: call("prctl", 4, 1, 0, 0, 0), True)
plain("let anybody trace it (PR_SET_PTRACER)", lambda: call("prctl", 0x59616D61, -1, 0, 0, 0), True)
plain("adopt orphans (PR_SET_CHILD_SUBREAPER)", lambda: call("prctl", 36, 1, 0, 0, 0), True)
plain("set a memory policy", lambda: call(238, 0, None, 0), True)
plain("make protection keys", lambda: call(330, 0, 0))
