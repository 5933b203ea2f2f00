"""System calls by number, as libraries refuse some before the kernel is asked."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
from collections.abc import Callable
from typing import Any

from ratoon.jail.attack.attempts import Denied, error_name

MIB = 1 << 20
TIB = 1 << 40
HANG_SECONDS = 5

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
# For clone: it keeps the interpreter's lock, which the child could otherwise wait for for ever.
LIBC_LOCKED = ctypes.PyDLL(None, use_errno=True)
LIBC_LOCKED.syscall.restype = ctypes.c_long
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
O_PATH = os.O_PATH
SYS = {
    "mprotect": 10,
    "shmget": 29, "shmctl": 31, "clone": 56, "semget": 64, "semctl": 66, "msgget": 68,
    "msgctl": 71, "ptrace": 101, "syslog": 103, "setuid": 105, "setgid": 106, "setgroups": 116,
    "setresuid": 117, "setresgid": 119, "setfsuid": 122, "setfsgid": 123, "capget": 125,
    "capset": 126, "rt_sigqueueinfo": 129, "uselib": 134, "personality": 135, "ustat": 136,
    "sysfs": 139, "vhangup": 153, "modify_ldt": 154, "pivot_root": 155, "_sysctl": 156,
    "prctl": 157, "adjtimex": 159, "acct": 163, "settimeofday": 164, "mount": 165,
    "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169, "sethostname": 170,
    "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
    "nfsservctl": 180, "io_setup": 206, "lookup_dcookie": 212, "remap_file_pages": 216,
    "clock_settime": 227, "tgkill": 234, "mq_open": 240, "mq_unlink": 241, "kexec_load": 246,
    "waitid": 247, "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251,
    "ioprio_get": 252, "inotify_add_watch": 254, "migrate_pages": 256, "linkat": 265,
    "unshare": 272, "vmsplice": 278, "move_pages": 279, "fallocate": 285, "inotify_init1": 294,
    "perf_event_open": 298, "fanotify_init": 300, "prlimit64": 302, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "setns": 308, "rt_tgsigqueueinfo": 297,
    "process_vm_readv": 310, "process_vm_writev": 311,
    "kcmp": 312, "finit_module": 313, "seccomp": 317, "kexec_file_load": 320, "bpf": 321,
    "execveat": 322, "userfaultfd": 323, "pidfd_send_signal": 424, "io_uring_setup": 425,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432,
    "fspick": 433, "pidfd_open": 434, "clone3": 435, "openat2": 437, "pidfd_getfd": 438,
    "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443,
    "landlock_create_ruleset": 444, "landlock_restrict_self": 446, "memfd_secret": 447,
    "listmount": 458,
}  # fmt: skip


def call(name: str | int, *arguments: Any) -> int:
    """Make a system call by name or number; raise OSError with its error."""
    number = SYS[name] if isinstance(name, str) else name
    words: list[Any] = []
    for argument in arguments:
        if argument is None:
            words.append(ctypes.c_void_p(None))
        elif isinstance(argument, int):
            words.append(ctypes.c_ulong(argument & (2**64 - 1)))
        elif isinstance(argument, bytes):
            words.append(ctypes.c_char_p(argument))
        else:
            words.append(argument)
    while len(words) < 6:
        words.append(ctypes.c_ulong(0))
    ctypes.set_errno(0)
    library = LIBC_LOCKED if name in ("clone", "clone3") else LIBC
    result = int(library.syscall(ctypes.c_long(number), *words))
    if result == -1 and ctypes.get_errno():
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def buffer(data: bytes | int) -> Any:
    return ctypes.create_string_buffer(data, data if isinstance(data, int) else len(data))


def address(of: Any) -> int:
    return ctypes.addressof(of)


def close_later(fd: int) -> str:
    """Close a descriptor that an attempt got, and say so."""
    os.close(fd)
    return f"a descriptor ({fd})"


def map_raw(fd: int, protection: int, flags: int) -> int:
    """mmap of one page without the checks that Python makes first."""
    LIBC.mmap.restype = ctypes.c_void_p
    ctypes.set_errno(0)
    where = LIBC.mmap(None, ctypes.c_size_t(4096), protection, flags, fd, ctypes.c_long(0))
    if where is None or where == 2**64 - 1:
        raise OSError(ctypes.get_errno(), "mmap")
    return int(where)


def run_code(code: bytes) -> int:
    """Run machine code of its own and return eax as a signed number."""
    fd = filled(code.ljust(4096, b"\0"))
    where = map_raw(fd, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE)
    os.close(fd)
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(where)())


def filled(data: bytes) -> int:
    """A file in memory with this content, its offset at the start."""
    fd = os.memfd_create("standin")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def capability_sets() -> tuple[int, int, int]:
    """Effective, permitted and inheritable capabilities."""
    data = buffer(24)
    call("capget", buffer(struct.pack("=II", 0x20080522, 0)), data)
    e0, p0, i0, e1, p1, i1 = struct.unpack("=6I", data.raw)
    return e0 | e1 << 32, p0 | p1 << 32, i0 | i1 << 32


def in_child(run: Callable[[], Any]) -> int:
    """Run something in a further process; return its wait status (with its error number)."""
    pid = os.fork()
    if pid == 0:
        code = 254
        try:
            LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)
            signal.alarm(HANG_SECONDS)
            run()
            code = 0
        except OSError as error:
            code = error.errno if error.errno and error.errno < 200 else 255
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def raise_status(status: int, good: int = 0) -> str:
    if os.WIFSIGNALED(status):
        raise Denied(f"killed by {signal.Signals(os.WTERMSIG(status)).name}")
    code = os.WEXITSTATUS(status)
    if code == good:
        return "it ran"
    raise Denied(error_name(code) if code < 200 else f"exit {code}")


def quiet() -> None:
    """Point the standard descriptors of a process about to exec at nothing."""
    try:
        null = os.open("/dev/null", os.O_RDWR)
    except OSError:
        null = os.pipe()[1]
    for fd in (0, 1, 2):
        os.dup2(null, fd)


def exits_with(arguments: list[str], code: int) -> str:
    def run() -> None:
        quiet()
        os.execve(arguments[0], arguments, {})

    return raise_status(in_child(run), code)
