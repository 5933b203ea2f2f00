"""Parts of the kernel that it has no use for."""

from __future__ import annotations

import errno
import functools
import mmap
import os
import struct
import time
from collections.abc import Callable
from typing import Any

from ratoon.jail.attack.attempts import (
    Denied,
    attempt,
    error_name,
    past_permission,
    register,
    try_each,
)
from ratoon.jail.attack.calls import AT_FDCWD, address, buffer, call, filled, map_raw, run_code
from ratoon.jail.attack.targets import T


def kernel(name: str, run: Callable[[], Any], *later: int, sticky: bool = False) -> None:
    def wrapped() -> str:
        if later:
            return past_permission(run, *later)
        return f"returned {run()}"

    register("kernel", name, wrapped, sticky)


FILTER = struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000)  # a filter that allows all


def install_filter(flags: int) -> int:
    call("prctl", 38, 1, 0, 0, 0)
    rules = buffer(FILTER)
    program = buffer(struct.pack("=HxxxxxxQ", 1, address(rules)))
    return call("seccomp", 1, flags, program)


def load_bpf() -> int:
    code = buffer(struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0))
    license_text = buffer(b"GPL\0")
    attributes = struct.pack("=IIQQ", 1, 2, address(code), address(license_text))
    return call("bpf", 5, buffer(attributes.ljust(128, b"\0")), 128)


def perf_event(pid: int, processor: int, flags: int, kind: int = 1) -> int:
    attributes = struct.pack("=IIQQQQQ", kind, 112, 0, 0, 0, 0, flags).ljust(112, b"\0")
    return call("perf_event_open", buffer(attributes), pid, processor, -1, 0)


def landlock_stack() -> int:
    rules = call("landlock_create_ruleset", buffer(struct.pack("=Q", 4)), 8, 0)
    call("prctl", 38, 1, 0, 0, 0)
    return call("landlock_restrict_self", rules, 0)


def step_clock() -> int:
    now = time.clock_gettime_ns(time.CLOCK_REALTIME)
    return call("clock_settime", 0, buffer(struct.pack("=qq", now // 10**9, now % 10**9)))


def keep_tick() -> int:
    timex = buffer(256)
    call("adjtimex", timex)
    struct.pack_into("=I", timex, 0, 0x4000)
    return call("adjtimex", timex)


def enter_i386(number: int) -> int:
    """A system call through the 32-bit door: push rbx; eax = number; zeros; int 0x80."""
    code = b"\x53\xb8" + struct.pack("=I", number)
    code += b"\x31\xdb\x31\xc9\x31\xd2\xcd\x80\x5b\xc3"
    result = run_code(code)
    if -4096 < result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def i386_getpid() -> int:
    result = enter_i386(20)
    if result != os.getpid():
        raise Denied(f"returned {result}, which is not our number")
    return result


def i386_mount() -> str:
    """With no arguments at all it must fail; EFAULT is the kernel's own word, no filter's."""
    try:
        return str(enter_i386(21))
    except OSError as error:
        if error.errno in (errno.EFAULT, errno.EINVAL, errno.ENOENT):
            return f"{error_name(error.errno)}, so no filter stood before it"
        raise


def hang_up() -> int:
    os.setsid()  # so that there is no terminal to lose
    return call("vhangup")


io_uring_parameters = functools.partial(buffer, 120)
kernel("io_uring_setup", lambda: call("io_uring_setup", 4, io_uring_parameters()))
kernel("bpf: load a program", load_bpf)
kernel("bpf: make a map", lambda: call("bpf", 0, buffer(struct.pack("=5I", 2, 4, 4, 1, 0)), 20))
kernel("userfaultfd", lambda: call("userfaultfd", 0o2000000))
kernel("userfaultfd for user mode only", lambda: call("userfaultfd", 0o2000001))
kernel("perf_event_open: itself", lambda: perf_event(0, -1, 0x60))
kernel("perf_event_open: itself in the kernel", lambda: perf_event(0, -1, 0))
kernel("perf_event_open: a whole processor", lambda: perf_event(-1, 0, 0))
kernel("kexec_load", lambda: call("kexec_load", 0, 0, None, 2**63), errno.EINVAL)
kernel(
    "kexec_file_load",
    lambda: call("kexec_file_load", -1, -1, 0, None, 2**31),
    errno.EINVAL,
)
kernel("init_module", lambda: call("init_module", b"none", 4, b""), errno.ENOEXEC, errno.EINVAL)
kernel("finit_module", lambda: call("finit_module", -1, b"", 0), errno.EBADF)
kernel("delete_module", lambda: call("delete_module", b"standin-none", 0x800), errno.ENOENT)
kernel("iopl", lambda: call("iopl", 3), sticky=True)
kernel("ioperm", lambda: call("ioperm", 0x80, 1, 1), sticky=True)
kernel("swapon", lambda: call("swapon", b"/no-such-file", 0), errno.ENOENT)
kernel("swapoff", lambda: call("swapoff", b"/no-such-file"), errno.ENOENT)
kernel("reboot", lambda: call("reboot", 1, 2, 3, None), errno.EINVAL)
kernel("syslog: read the kernel log", lambda: call("syslog", 3, buffer(4096), 4096))
kernel("syslog: size of the kernel log", lambda: call("syslog", 10, None, 0))
kernel("acct", lambda: call("acct", b"/no-such-file"), errno.ENOENT)
kernel("settimeofday", lambda: call("settimeofday", None, None))
kernel("clock_settime (to the present time)", step_clock)
kernel("adjtimex (to the present tick)", keep_tick)
kernel("sethostname", lambda: call("sethostname", os.uname().nodename.encode(),
                                   len(os.uname().nodename)))  # fmt: skip
kernel("setdomainname", lambda: call("setdomainname", b"", 2**31), errno.EINVAL)
kernel("fanotify with permission events", lambda: call("fanotify_init", 4, 0))
kernel("fanotify without privilege", lambda: call("fanotify_init", 0x200, 0))
kernel("x32 system calls", lambda: call(0x40000000 + 39))
kernel("32-bit system calls (int 0x80)", i386_getpid)
kernel("vm86 through int 0x80", lambda: enter_i386(113))
kernel("reach mount through int 0x80, past a filter", i386_mount)
kernel("modify_ldt", lambda: call("modify_ldt", 0x11, buffer(16), 16), sticky=True)
kernel("memfd_secret", lambda: call("memfd_secret", 0))
kernel("seccomp: add a filter", lambda: install_filter(0), sticky=True)
kernel("seccomp: a filter with a listener", lambda: install_filter(8), sticky=True)
kernel("landlock: make a ruleset", lambda: call("landlock_create_ruleset", None, 0, 1))
kernel("landlock: restrict itself further", landlock_stack, sticky=True)
kernel("sysfs (names of file systems)", lambda: call("sysfs", 3))
kernel("ustat", lambda: call("ustat", os.stat("/").st_dev, buffer(64)))
kernel("lookup_dcookie", lambda: call("lookup_dcookie", 1, buffer(64), 64))
kernel("uselib", lambda: call("uselib", b"/no-such-file"), errno.ENOENT)
kernel("nfsservctl and _sysctl", lambda: try_each(
    ["nfsservctl", "_sysctl"], lambda name: str(call(name, None, None, None))))  # fmt: skip
kernel("vhangup", hang_up, sticky=True)


@attempt("kernel", "remap_file_pages")
def _() -> str:
    fd = filled(b"x" * 8192)
    where = map_raw(fd, mmap.PROT_READ, mmap.MAP_SHARED)
    return f"returned {call('remap_file_pages', where, 4096, 0, 1, 0)}"


@attempt("kernel", "quotactl on descriptors it holds")
def _() -> str:
    get = 0x800007 << 8  # Q_GETQUOTA for user 0
    return try_each(
        T.layers + T.overlay,
        lambda fd: past_permission(
            lambda: call("quotactl_fd", fd, get, 0, buffer(256)), errno.ESRCH
        ),
    )


@attempt("kernel", "mark others' files with fanotify")
def _() -> str:
    fd = call("fanotify_init", 0x200, 0)
    for flags in (0x10, 0x100):  # a mount, a file system
        try:
            return f"returned {call(301, fd, 1 | flags, 0x20, AT_FDCWD, b'/')}"
        except OSError as error:
            last = error
    raise last
