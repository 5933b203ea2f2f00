"""Using up what the host has."""

from __future__ import annotations

import _thread
import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from ratoon.jail.attack.attempts import Denied, attempt, error_name, register, try_each
from ratoon.jail.attack.calls import MIB, TIB, address, buffer, call
from ratoon.jail.attack.targets import T, as_list


def until_refused(limit: int, take: Callable[[], Any], seconds: float = 2.5) -> str:
    """Take until refused: a refusal is "denied" with the count, none up to the bound "allowed"."""
    end = time.monotonic() + seconds
    for count in range(limit):
        try:
            take()
        except (OSError, RuntimeError) as error:
            why = error_name(error.errno) if isinstance(error, OSError) else str(error)
            raise Denied(f"{why} after {count}") from error
        if count % 64 == 0 and time.monotonic() > end:
            return f"no refusal up to {count + 1}, when time was up"
    return f"no refusal up to {limit}"


def raise_soft(kind: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (hard, hard))


@attempt("exhaustion", "open 100,000 descriptors")
def _() -> str:
    raise_soft(resource.RLIMIT_NOFILE)
    fd, _end = os.pipe()
    taken: list[int] = []
    try:
        return until_refused(100_000, lambda: taken.append(os.dup(fd)))
    finally:
        for number in taken:
            os.close(number)


@attempt("exhaustion", "make 2,000 processes")
def _() -> str:
    raise_soft(resource.RLIMIT_NPROC)
    taken: list[int] = []

    def one() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)  # unreaped, it still counts against every limit
        taken.append(pid)

    try:
        return until_refused(2000, one)
    finally:
        for pid in taken:
            os.waitpid(pid, 0)


@attempt("exhaustion", "make 2,000 threads")
def _() -> str:
    raise_soft(resource.RLIMIT_NPROC)
    _thread.stack_size(64 * 1024)
    gate = _thread.allocate_lock()
    gate.acquire()

    def wait() -> None:
        with gate:
            pass

    try:
        return until_refused(2000, lambda: _thread.start_new_thread(wait, ()))
    finally:
        gate.release()
        _thread.stack_size(0)


@attempt("exhaustion", "lock 64 MiB of memory")
def _() -> str:
    area = mmap.mmap(-1, 64 * MIB)
    call(149, address(ctypes.c_char.from_buffer(area)), 64 * MIB)
    return "locked"


@attempt("exhaustion", "lock all of its memory to come (mlockall)")
def _() -> str:
    result = call(151, 2)
    call(152)
    return f"returned {result}"


def grow(fd: int) -> str:
    before = os.fstat(fd)
    if not stat.S_ISREG(before.st_mode):
        raise Denied("not a regular file")

    def far(how: str) -> str:
        try:
            if how == "ftruncate":
                os.ftruncate(fd, TIB)
            elif how == "pwrite":
                os.pwrite(fd, b"\0", TIB - 1)
            else:
                call("fallocate", fd, 1, TIB - 4096, 4096)  # beyond the end, the length kept
                call("fallocate", fd, 3, TIB - 4096, 4096)
                return "blocks far out"
            if os.fstat(fd).st_size < TIB:
                raise Denied("it was only appended to")
            return f"{os.fstat(fd).st_size} bytes long"
        finally:
            if os.fstat(fd).st_size != before.st_size:
                os.ftruncate(fd, before.st_size)

    return try_each(["ftruncate", "pwrite", "fallocate"], far)


@attempt("exhaustion", "grow the overlay to 1 TiB")
def _() -> str:
    return try_each(T.overlay, grow)


@attempt("exhaustion", "grow the console and log to 1 TiB")
def _() -> str:
    return try_each(T.traces, grow)


@attempt("exhaustion", "grow the memory image by its path to 1 TiB")
def _() -> str:
    return try_each(as_list(T.memory), lambda path: grow(os.open(path, os.O_RDWR)))


@attempt("exhaustion", "have no limit on a file's length (RLIMIT_FSIZE)")
def _() -> str:
    return unlimited(resource.RLIMIT_FSIZE)


def unlimited(kind: int) -> str:
    soft, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        raise Denied(f"soft {soft}, hard {hard}")
    return "no hard limit"


@attempt("exhaustion", "have no limit on processor time (RLIMIT_CPU)")
def _() -> str:
    return unlimited(resource.RLIMIT_CPU)


@attempt("exhaustion", "have no limit on memory to be seen (RLIMIT_AS, control group)")
def _() -> str:
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            raise Denied(f"a resource limit of {hard}")
    seen = "no control group to be seen"
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                value = file.read().strip()
        except OSError:
            continue
        if value != "max" and int(value) < TIB:
            raise Denied(f"a control group limit of {value}")
        seen = f"{path} says {value}"
    return f"no resource limit, {seen}"


@attempt("exhaustion", "reserve 1 TiB of addresses")
def _() -> str:
    mmap.mmap(-1, TIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=0).close()
    return "reserved (nothing was touched)"


@attempt("exhaustion", "queue 20,000 signals", sticky=True)
def _() -> str:
    number = int(signal.SIGRTMIN) + 5
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    info = buffer(struct.pack("=iii", number, 0, -1).ljust(128, b"\0"))
    me, thread = os.getpid(), _thread.get_native_id()
    try:
        return until_refused(20_000, lambda: call("rt_tgsigqueueinfo", me, thread, number, info))
    finally:
        signal.signal(number, signal.SIG_IGN)  # which drops what is queued


@attempt("exhaustion", "make 64 POSIX message queues")
def _() -> str:
    taken: list[bytes] = []

    def one() -> None:
        name = b"standin-%d-%d" % (os.getpid(), len(taken))
        call("mq_open", name, os.O_CREAT | os.O_RDWR, 0o600, None)
        taken.append(name)

    try:
        return until_refused(64, one)
    finally:
        for name in taken:
            call("mq_unlink", name)


def system_v(what: str, make: Callable[[], int], remove: Callable[[int], Any]) -> None:
    def run() -> str:
        taken: list[int] = []
        try:
            return until_refused(64, lambda: taken.append(make()))
        finally:
            for number in taken:
                remove(number)

    register("exhaustion", f"make 64 System V {what}", run)


system_v(
    "shared memory segments",
    lambda: call("shmget", 0, 4096, 0o1600),
    lambda number: call("shmctl", number, 0, None),
)
system_v(
    "semaphore sets",
    lambda: call("semget", 0, 4, 0o1600),
    lambda number: call("semctl", number, 0, 0, 0),
)
system_v(
    "message queues",
    lambda: call("msgget", 0, 0o1600),
    lambda number: call("msgctl", number, 0, None),
)


@attempt("exhaustion", "see System V objects of others (shmctl SHM_STAT_ANY)")
def _() -> str:
    def one(index: int) -> str:
        return f"segment {call('shmctl', index, 15, buffer(256))}"

    return try_each(range(64), one)


@attempt("exhaustion", "enlarge 128 pipes to 1 MiB")
def _() -> str:
    return until_refused(128, lambda: fcntl.fcntl(os.pipe()[1], 1031, MIB))


@attempt("exhaustion", "enlarge a pipe to 64 MiB")
def _() -> str:
    return f"{fcntl.fcntl(os.pipe()[1], 1031, 64 * MIB)} bytes"


@attempt("exhaustion", "make 1,000 inotify instances")
def _() -> str:
    return until_refused(1000, lambda: call("inotify_init1", 0))


@attempt("exhaustion", "take 2,000 file locks")
def _() -> str:
    fd = os.memfd_create("locks")
    ranges: Iterator[int] = iter(range(0, 8000, 2))

    def one() -> None:
        fcntl.fcntl(fd, 37, struct.pack("=hhxxxxqqixxxx", fcntl.F_WRLCK, 0, next(ranges), 1, 0))

    return until_refused(2000, one)


@attempt("exhaustion", "make 1,000 timers")
def _() -> str:
    number = buffer(8)
    return until_refused(1000, lambda: call(222, 1, None, number))


@attempt("exhaustion", "keep 1,000 descriptors in flight over a unix socket")
def _() -> str:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    here.setblocking(False)
    there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    fds = [there.fileno()] * 50
    return until_refused(20, lambda: socket.send_fds(here, [b"x"], fds))


@attempt("exhaustion", "leave core dumps (RLIMIT_CORE)")
def _() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        raise Denied("hard limit 0")
    raise_soft(resource.RLIMIT_CORE)
    dumpable = call("prctl", 3, 0, 0, 0, 0)
    return f"soft {soft}, raised to hard {hard}, dumpable {dumpable}"


@attempt("exhaustion", "take a real-time priority (SCHED_FIFO)")
def _() -> str:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return "taken and given back"


@attempt("exhaustion", "take a deadline from the scheduler (SCHED_DEADLINE)")
def _() -> str:
    wanted = struct.pack("=IIQiIQQQ", 48, 6, 0, 0, 0, 1_000_000, 100_000_000, 100_000_000)
    call(314, 0, buffer(wanted), 0)
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return "taken and given back"


@attempt("exhaustion", "take a negative nice value")
def _() -> str:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, -5)
    os.setpriority(os.PRIO_PROCESS, 0, before)
    return "taken and given back"


@attempt("exhaustion", "take a real-time disk priority")
def _() -> str:
    call("ioprio_set", 1, 0, 1 << 13 | 4)
    call("ioprio_set", 1, 0, 0)
    return "taken and given back"


@attempt("exhaustion", "use every processor (sched_setaffinity)")
def _() -> str:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    after = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before)
    if len(after) < (os.cpu_count() or 1):
        raise Denied(f"{len(after)} of {os.cpu_count()}")
    return f"all {len(after)}"


@attempt("exhaustion", "raise a hard resource limit", sticky=True)
def _() -> str:
    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]

    def one(name: str) -> str:
        kind = getattr(resource, name)
        soft, hard = resource.getrlimit(kind)
        if hard == resource.RLIM_INFINITY:
            raise Denied("already without a limit")
        call("prlimit64", 0, kind, buffer(struct.pack("=QQ", soft & 2**64 - 1, hard + 1)), None)
        resource.setrlimit(kind, (soft, hard))
        return f"{hard} + 1"

    return try_each(names, one)
