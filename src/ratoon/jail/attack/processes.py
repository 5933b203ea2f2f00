"""Signals to other processes, their memory and settings, and programs of its own."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import struct
import sys
from collections.abc import Callable
from typing import Any

from ratoon.jail.attack.around import (
    for_pids,
    fresh,
    other_processes,
    require_others,
    writable_places,
)
from ratoon.jail.attack.attempts import Denied, attempt, past_permission, register, try_each
from ratoon.jail.attack.calls import (
    AT_EMPTY_PATH,
    address,
    buffer,
    call,
    close_later,
    exits_with,
    filled,
    in_child,
    quiet,
    raise_status,
)
from ratoon.jail.attack.targets import AT_START, MAIN_PARENT, MAIN_PID, T


def aimed(name: str, one: Callable[[int], str | None]) -> None:
    register("processes", name, lambda: for_pids(one))


def pidfd(pid: int) -> int:
    return call("pidfd_open", pid, 0)


def queue_info(code: int = -1) -> Any:
    return buffer(struct.pack("=iii", 0, 0, code).ljust(128, b"\0"))


def ptrace(request: int, pid: int, where: int = 0, data: int = 0) -> int:
    return call("ptrace", request, pid, where, data)


def ptrace_attach(pid: int) -> str:
    try:
        ptrace(0x4206, pid)
    except OSError:
        ptrace(16, pid)
        os.waitpid(pid, 0x40000000)
        ptrace(17, pid)
        return "attached and detached"
    return "PTRACE_SEIZE worked already, so it was left at that"


def remote_memory(name: str) -> Callable[[int], str]:
    def one(pid: int) -> str:
        here = buffer(8)
        local = buffer(struct.pack("=QQ", address(here), 8))
        remote = buffer(struct.pack("=QQ", 0x1000, 8))
        return past_permission(lambda: call(name, pid, local, 1, remote, 1, 0), errno.EFAULT)

    return one


def steal_descriptor(pid: int) -> str:
    fd = pidfd(pid)
    return try_each(range(16), lambda number: close_later(call("pidfd_getfd", fd, number, 0)))


def set_limits(pid: int) -> str:
    now = buffer(16)
    call("prlimit64", pid, resource.RLIMIT_NOFILE, None, now)
    call("prlimit64", pid, resource.RLIMIT_NOFILE, now, None)
    return "limits were read and set (to what they were)"


def read_limits(pid: int) -> str:
    now = buffer(16)
    call("prlimit64", pid, resource.RLIMIT_NOFILE, None, now)
    return f"limits {struct.unpack('=QQ', now.raw)}"


def set_priority(pid: int) -> None:
    os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid))


def set_scheduler(pid: int) -> None:
    os.sched_setscheduler(pid, os.sched_getscheduler(pid), os.sched_getparam(pid))


def set_io_priority(pid: int) -> None:
    call("ioprio_set", 1, pid, call("ioprio_get", 1, pid))


def advise(pid: int) -> None:
    vector = buffer(16)
    call("process_madvise", pidfd(pid), vector, 0, 20, 0)


def wait_for(pid: int) -> str:
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return "it counts as a child"
    return "its end was seen"


def foreign_group(pid: int) -> int:
    group = os.getpgid(pid)
    if group == os.getpgrp():
        raise Denied("its group is our own, as whoever started us arranged")
    return group


def keep_group(pid: int) -> str:
    foreign_group(pid)
    try:
        os.setpgid(pid, os.getpgid(pid))
    except OSError:
        os.setpgid(0, os.getpgid(pid))
        return "joined its process group"
    return "set its process group (to what it was)"


aimed("signal others (kill)", lambda pid: os.kill(pid, 0))
aimed("signal the process groups of others", lambda pid: os.killpg(foreign_group(pid), 0))
aimed("signal others (tgkill)", lambda pid: str(call("tgkill", pid, pid, 0)))
aimed(
    "signal others (rt_sigqueueinfo with a forged sender)",
    lambda pid: str(call("rt_sigqueueinfo", pid, 0, queue_info())),
)
aimed("open others as pidfd", lambda pid: close_later(pidfd(pid)))
aimed(
    "signal others through pidfd",
    lambda pid: str(call("pidfd_send_signal", pidfd(pid), 0, None, 0)),
)
aimed("take descriptors of others (pidfd_getfd)", steal_descriptor)
aimed("trace others (PTRACE_SEIZE)", lambda pid: str(ptrace(0x4206, pid)))
aimed("trace others (PTRACE_ATTACH)", ptrace_attach)
aimed("read the memory of others (process_vm_readv)", remote_memory("process_vm_readv"))
aimed("write the memory of others (process_vm_writev)", remote_memory("process_vm_writev"))
aimed("read the limits of others", read_limits)
aimed("set the limits of others", set_limits)
aimed("set the priority of others", set_priority)
aimed("set the scheduling of others", set_scheduler)
aimed(
    "set the processors of others",
    lambda pid: os.sched_setaffinity(pid, os.sched_getaffinity(pid)),
)
aimed("set the disk priority of others", set_io_priority)
aimed("compare itself with others (kcmp)", lambda p: str(call("kcmp", os.getpid(), p, 1, 0, 0)))
aimed("wait for others", wait_for)
aimed("move pages of others", lambda pid: str(call("move_pages", pid, 0, None, None, None, 0)))
aimed("migrate pages of others", lambda pid: str(call("migrate_pages", pid, 1, None, None)))
aimed("advise on the memory of others (process_madvise)", advise)
aimed("change or join process groups of others", keep_group)
aimed("see the session of others", lambda pid: f"session {os.getsid(pid)}")
aimed(
    "share a core-scheduling group with others",
    lambda pid: str(call("prctl", 62, 3, pid, 0, None)),
)


@attempt("processes", "signal everything (kill -1)")
def _() -> str:
    os.kill(-1, 0)
    require_others()
    if not any(other_processes().values()):
        raise Denied("it reached only our own processes")
    return "signal 0 was accepted"


@attempt("processes", "find any process by number that can be signalled")
def _() -> str:
    require_others()
    others = other_processes()
    return try_each(others, lambda pid: None if others[pid] else os.kill(pid, 0))


@attempt("processes", "see that other processes exist")
def _() -> str:
    require_others()
    return f"{len(other_processes())} seen, as {list(other_processes())[:4]}"


def near_process(name: str, find: Callable[[], int]) -> None:
    def run() -> str:
        pid = find()
        if pid in (0, os.getpid(), MAIN_PID):
            raise Denied("not to be seen from here" if pid == 0 else "that is the stand-in")
        os.kill(pid, 0)
        return f"signal 0 to {pid} was accepted"

    def trace() -> str:
        pid = find()
        if pid in (0, os.getpid(), MAIN_PID):
            raise Denied("not to be seen from here" if pid == 0 else "that is the stand-in")
        return f"traced {pid}: {ptrace(0x4206, pid)}"

    register("processes", f"signal {name}", run)
    register("processes", f"trace {name}", trace)


near_process("process 1", lambda: 1)
near_process("the process that started it", lambda: MAIN_PARENT)


@attempt("processes", "set the priority of all processes of the neighbour's user")
def _() -> str:
    if T.neighbour_uid is None:
        raise Denied("not tried: no user was named")
    before: dict[int, int] = {}
    for pid in other_processes():
        try:
            before[pid] = os.getpriority(os.PRIO_PROCESS, pid)
        except OSError:
            continue
    os.setpriority(os.PRIO_USER, T.neighbour_uid, os.getpriority(os.PRIO_USER, T.neighbour_uid))
    for pid, value in before.items():
        try:
            if os.getpriority(os.PRIO_PROCESS, pid) != value:
                os.setpriority(os.PRIO_PROCESS, pid, value)
        except OSError:
            continue
    require_others()
    return "it was accepted"


@attempt("processes", "set the priority of a neighbour's process group")
def _() -> str:
    def one(pid: int) -> None:
        group = foreign_group(pid)
        os.setpriority(os.PRIO_PGRP, group, os.getpriority(os.PRIO_PGRP, group))

    return for_pids(one)


@attempt("processes", "push input into a terminal (TIOCSTI, TIOCLINUX)")
def _() -> str:
    def one(fd: int) -> str:
        if not os.isatty(fd):
            raise Denied("not a terminal")
        try:
            fcntl.ioctl(fd, 0x5412, b"\0")
        except OSError:
            fcntl.ioctl(fd, 0x541C, bytearray(b"\x06"))
        return "accepted"

    return try_each(AT_START, one)


@attempt("processes", "find settings in the environment beyond the harmless")
def _() -> str:
    harmless = {"PATH", "HOME", "LANG", "LANGUAGE", "TERM", "PWD", "SHLVL", "TZ", "_", "USER"}
    names = [n for n in os.environ if n not in harmless and not n.startswith("LC_")]
    if not names:
        raise Denied("nothing of note")
    return "names only: " + ", ".join(sorted(names)[:8])


# A static program whose only act is to end with code 42.
TINY_PROGRAM = (
    struct.pack("=16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, 0x400078, 64, 0, 0, 64, 56,
                1, 0, 0, 0)
    + struct.pack("=IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, 132, 132, 0x1000)
    + b"\xbf\x2a\x00\x00\x00\xb8\x3c\x00\x00\x00\x0f\x05"
)  # fmt: skip


@attempt("processes", "run a shell")
def _() -> str:
    shells = ["/bin/sh", "/bin/bash", "/usr/bin/sh", "/bin/busybox", "/bin/dash"]
    return try_each(shells, lambda path: exits_with([path, "-c", "exit 42"], 42))


@attempt("processes", "run its own program again")
def _() -> str:
    program = ["-I", "-S", "-c", "import os; os._exit(42)"]
    return try_each(
        ["/proc/self/exe", sys.executable], lambda path: exits_with([path, *program], 42)
    )


def run_from(fd: int) -> str:
    def run() -> None:
        quiet()
        none = (ctypes.c_char_p * 1)(None)
        call("execveat", fd, b"", none, none, AT_EMPTY_PATH)

    return raise_status(in_child(run), 42)


@attempt("processes", "run a program made in memory (memfd)")
def _() -> str:
    return run_from(filled(TINY_PROGRAM))


@attempt("processes", "run the descriptors it holds as programs")
def _() -> str:
    return try_each(T.overlay + T.layers, run_from)


@attempt("processes", "run a program written anywhere")
def _() -> str:
    def one(place: str) -> str:
        path = fresh(place)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700)
        try:
            os.write(fd, TINY_PROGRAM)
            os.close(fd)
            return exits_with([path], 42)
        finally:
            os.unlink(path)

    return try_each(writable_places()[:8], one)
