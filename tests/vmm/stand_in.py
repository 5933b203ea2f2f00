"""A stand-in for a QEMU process that was broken into.

Started in QEMU's place and confinement as ``python -I -S attacks.py TARGETS``, it tries to get
whatever it can and prints one JSON object per attempt, then ``{"done": true}``.  "allowed" means
that the attempt got the thing it was after.  A refusal, a kill by the kernel and a hang are all
"denied".  Where an attempt had nothing to aim at, it is "denied" with a reason that begins with
"not tried:", so that a reader can tell it from a real refusal.

Dangerous calls are made so that the kernel's *permission* shows without the effect: with invalid
arguments that are only looked at after the permission check, or with the present value.

Besides the keys that say what the honest process holds and what others hold, TARGETS may have
``"only": [names]`` (run these alone), ``"skip": [names]`` and ``"in_process": true`` (make no
child).  ``--list`` in its place prints the attempts and makes none.
"""

import _thread
import ctypes
import errno
import fcntl
import functools
import json
import mmap
import os
import resource
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

HANG_SECONDS = 5
PARENT_SECONDS = 7
MIB = 1 << 20
TIB = 1 << 40


# --- Registering, and what an attempt may say ----------------------------------------------------


class Denied(Exception):
    """The attempt did not get what it wanted; the text says how it was refused."""


class Attempt:
    """One thing to try: `run` returns how it was allowed, or raises Denied or OSError."""

    def __init__(self, group: str, name: str, run: Callable[[], str | None], sticky: bool) -> None:
        self.group = group
        self.name = name
        self.run = run
        self.sticky = sticky


ATTEMPTS: list[Attempt] = []


def register(group: str, name: str, run: Callable[[], str | None], sticky: bool = False) -> None:
    """Add an attempt; a sticky one changes its process for good (it runs last without fork)."""
    assert all(known.name != name for known in ATTEMPTS), name
    ATTEMPTS.append(Attempt(group, name, run, sticky))


def attempt(group: str, name: str, sticky: bool = False) -> Callable[..., Any]:
    def decorate(run: Callable[[], str | None]) -> Callable[[], str | None]:
        register(group, name, run, sticky)
        return run

    return decorate


def error_name(number: int | None) -> str:
    return errno.errorcode.get(number or 0, f"errno {number}")


def reason_of(error: BaseException) -> str:
    if isinstance(error, Denied):
        return str(error)
    if isinstance(error, TimeoutError) and error.errno is None:
        return "timed out"
    if isinstance(error, OSError):
        return error_name(error.errno)
    return f"fault in the stand-in: {type(error).__name__}: {error}"


def try_each(items: Iterable[Any], one: Callable[[Any], str | None]) -> str:
    """Try `one` on every item: allowed if any of them was, with which; else the reasons counted."""
    allowed: list[str] = []
    refused: dict[str, int] = {}
    for item in items:
        try:
            detail = one(item)
        except (Denied, OSError, ValueError, OverflowError) as error:
            reason = reason_of(error)
            refused[reason] = refused.get(reason, 0) + 1
        else:
            allowed.append(f"{item}: {detail}" if detail else str(item))
    if allowed:
        more = f" and {len(allowed) - 5} more" if len(allowed) > 5 else ""
        return "; ".join(allowed[:5]) + more
    if not refused:
        raise Denied("not tried: nothing of this kind was named")
    raise Denied(", ".join(f"{reason} x{count}" for reason, count in refused.items()))


def past_permission(call: Callable[[], Any], *later: int) -> str:
    """Make a call whose errors `later` come only after the permission check was passed."""
    try:
        call()
    except OSError as error:
        if error.errno in later:
            return f"{error_name(error.errno)}, which comes after the permission check"
        raise
    return "it succeeded"


# --- What the driver said ------------------------------------------------------------------------


def as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


class Targets:
    """What the honest process was given, and what others have on the host."""

    def __init__(self, given: dict[str, Any]) -> None:
        own = given.get("own") or {}
        self.memory: str | None = own.get("memory")
        self.layers: list[int] = as_list(own.get("layers"))
        self.overlay: list[int] = as_list(own.get("overlay"))
        self.traces: list[int] = as_list(own.get("console")) + as_list(own.get("log"))
        self.writable: list[int] = self.overlay + self.traces
        self.sockets: dict[str, int] = own.get("sockets") or {}
        self.host_paths: list[str] = as_list(given.get("host_paths"))
        self.unix_sockets: list[str] = as_list(given.get("unix_sockets"))
        self.abstract: list[str] = as_list(given.get("abstract"))
        self.pids: list[int] = [int(pid) for pid in as_list(given.get("pids"))]
        self.tcp: list[tuple[str, int]] = [(h, int(p)) for h, p in as_list(given.get("tcp"))]
        self.udp: list[tuple[str, int]] = [(h, int(p)) for h, p in as_list(given.get("udp"))]
        self.neighbour_uid: int | None = given.get("uid_of_neighbour")
        self.only: list[str] = as_list(given.get("only"))
        self.skip: list[str] = as_list(given.get("skip"))
        self.in_process: bool = bool(given.get("in_process"))

    def held(self) -> list[int]:
        return self.layers + self.writable + list(self.sockets.values())


T = Targets({})
MAIN_PID = os.getpid()
MAIN_PARENT = os.getppid()
AT_START: list[int] = []  # descriptors that were open before this module opened any


# --- Raw system calls ----------------------------------------------------------------------------

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


# --- Looking around ------------------------------------------------------------------------------


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


# --- Files: what lies on the host ----------------------------------------------------------------


@attempt("files", "open host paths for reading")
def _() -> str:
    return try_each(T.host_paths, lambda path: opens(path, os.O_RDONLY))


@attempt("files", "open host paths for writing")
def _() -> str:
    return try_each(T.host_paths, lambda path: opens(path, os.O_WRONLY))


@attempt("files", "open host paths as bare references (O_PATH)")
def _() -> str:
    return try_each(T.host_paths, lambda path: opens(path, O_PATH))


@attempt("files", "see that host paths exist (stat)")
def _() -> str:
    return try_each(T.host_paths, lambda path: f"inode {os.lstat(path).st_ino}")


@attempt("files", "list host directories")
def _() -> str:
    places = {os.path.dirname(path) for path in T.host_paths} | set(T.host_paths)
    places -= {"/", ""}
    return try_each(sorted(places), lambda path: f"{len(os.listdir(path))} names")


@attempt("files", "climb to host paths with ..")
def _() -> str:
    return try_each(T.host_paths, lambda path: opens("../" * 40 + path.lstrip("/"), os.O_RDONLY))


@attempt("files", "open host paths with openat2 and no resolve limits")
def _() -> str:
    how = buffer(struct.pack("=QQQ", os.O_RDONLY | os.O_NONBLOCK, 0, 0))

    def one(path: str) -> str:
        return close_later(call("openat2", AT_FDCWD, os.fsencode(path), how, 24))

    return try_each(T.host_paths, one)


@attempt("files", "find an inherited descriptor that is a directory")
def _() -> str:
    def one(fd: int) -> str:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            raise Denied("not a directory")
        return "a directory"

    return try_each([fd for fd in AT_START if fd > 2], one)


@attempt("files", "openat host paths from every inherited descriptor")
def _() -> str:
    pairs = [(fd, path) for fd in AT_START for path in T.host_paths]
    return try_each(
        pairs,
        lambda pair: opens("../" * 40 + pair[1].lstrip("/"), os.O_RDONLY, dir_fd=pair[0]),
    )


@attempt("files", "walk out through fchdir on every inherited descriptor", sticky=True)
def _() -> str:
    def one(fd: int) -> str:
        os.fchdir(fd)
        return "it became the current directory"

    return try_each([fd for fd in AT_START if fd > 2], one)


@attempt("files", "find descriptors that were not listed")
def _() -> str:
    listed = set(T.held()) | {0, 1, 2}

    def one(fd: int) -> str:
        mode = os.fstat(fd).st_mode
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            name = "name unknown"
        return f"{oct(stat.S_IFMT(mode))} {name}"

    extra = [fd for fd in AT_START if fd not in listed]
    if not extra:
        raise Denied("none besides those listed and the standard three")
    return try_each(extra, one)


def through(name: str, prefixes: Callable[[], list[str]]) -> None:
    def run() -> str:
        pairs = [(prefix, path) for prefix in prefixes() for path in T.host_paths]
        return try_each(pairs, lambda pair: opens(pair[0] + pair[1], os.O_RDONLY))

    register("files", f"reach host paths through {name}", run)


def proc_pids(*tails: str) -> list[str]:
    pids = foreign_pids() + [MAIN_PARENT]
    return [f"/proc/{pid}/{tail}" for pid in pids for tail in tails]


def proc_one(tail: str) -> list[str]:
    """Process 1, unless that is the stand-in."""
    return [] if MAIN_PID == 1 else [f"/proc/1/{tail}"]


through("/proc/self/root", lambda: ["/proc/self/root", "/proc/thread-self/root"])
through("/proc/1/root", lambda: ["/proc/1/root"])
through("the root of other processes", lambda: proc_pids("root"))
through("/proc/1/cwd", lambda: ["/proc/1/cwd/" + "../" * 40])
through(
    "the current directory of other processes",
    lambda: [prefix + "/" + "../" * 40 for prefix in proc_pids("cwd")],
)
through("directories in /proc/self/fd", lambda: [f"/proc/self/fd/{fd}/.." for fd in AT_START])


@attempt("files", "reopen the descriptors of other processes from /proc")
def _() -> str:
    def one(path: str) -> str:
        names = os.listdir(path)
        return try_each(names[:64], lambda name: opens(f"{path}/{name}", os.O_RDONLY))

    return try_each([*proc_one("fd"), *proc_pids("fd")], one)


@attempt("files", "read the memory image of other processes (/proc/PID/mem, maps, environ)")
def _() -> str:
    paths = proc_pids("mem", "maps", "environ", "auxv", "stack", "syscall", "pagemap")
    return try_each(paths, lambda path: opens(path, os.O_RDONLY))


@attempt("files", "open the memory of other processes for writing")
def _() -> str:
    return try_each(proc_pids("mem"), lambda path: opens(path, os.O_RDWR))


@attempt("files", "read the command lines and status of other processes")
def _() -> str:
    return try_each(proc_pids("cmdline", "status", "stat", "exe"), first_bytes)


def opening(name: str, paths: list[str], flags: int = os.O_RDONLY) -> None:
    register("files", name, lambda: try_each(paths, lambda path: opens(path, flags)))


opening("open /proc/kcore", ["/proc/kcore"])
opening("open /dev/mem, /dev/kmem and /dev/port", ["/dev/mem", "/dev/kmem", "/dev/port"])
opening("open /dev/kmsg and /proc/kmsg", ["/dev/kmsg", "/proc/kmsg"])
opening(
    "open disks",
    [f"/dev/{n}" for n in ("sda", "sda1", "vda", "vda1", "nvme0n1", "nvme0n1p1", "xvda", "dm-0")]
    + ["/dev/loop0", "/dev/md0", "/dev/zram0", "/dev/nbd0", "/dev/mapper/control"],
)
opening("open /dev/kvm", ["/dev/kvm"], os.O_RDWR)
opening(
    "open the vhost, tun and vfio devices",
    ["/dev/vhost-net", "/dev/vhost-vsock", "/dev/net/tun", "/dev/vfio/vfio", "/dev/vhci"],
    os.O_RDWR,
)
opening(
    "open devices with a large kernel interface",
    ["/dev/fuse", "/dev/loop-control", "/dev/uinput", "/dev/udmabuf", "/dev/dri/card0"]
    + ["/dev/dri/renderD128", "/dev/ptmx", "/dev/cuse", "/dev/userfaultfd", "/dev/snapshot"],
    os.O_RDWR,
)
opening("open terminals", ["/dev/tty", "/dev/console", "/dev/tty0", "/dev/tty1", "/dev/pts/0"])
opening("open random devices for writing", ["/dev/random", "/dev/urandom"], os.O_WRONLY)
opening("open /proc/sysrq-trigger for writing", ["/proc/sysrq-trigger"], os.O_WRONLY)
opening(
    "open kernel settings for writing",
    ["/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/vm/drop_caches"]
    + ["/proc/sys/kernel/hotplug", "/proc/sys/fs/binfmt_misc/register", "/proc/sys/kernel/sysrq"]
    + ["/proc/sys/net/ipv4/ip_forward", "/proc/sys/kernel/ns_last_pid", "/proc/sys/fs/file-max"],
    os.O_WRONLY,
)
opening(
    "open /sys controls for writing",
    ["/sys/kernel/uevent_helper", "/sys/power/state", "/sys/fs/cgroup/release_agent"]
    + ["/sys/kernel/mm/ksm/run", "/sys/kernel/debug/sched_features", "/sys/class/net"],
    os.O_WRONLY,
)
opening(
    "read what the kernel tells in /proc",
    ["/proc/modules", "/proc/net/unix", "/proc/net/tcp", "/proc/keys", "/proc/timer_list"]
    + ["/proc/mounts", "/proc/partitions", "/proc/interrupts", "/proc/cmdline", "/proc/loadavg"],
)
opening(
    "read what the kernel tells in /sys",
    ["/sys/kernel/notes", "/sys/firmware/dmi/tables/DMI", "/sys/kernel/vmcoreinfo"]
    + ["/sys/kernel/debug", "/sys/kernel/tracing", "/sys/devices", "/sys/block"],
)


@attempt("files", "read kernel addresses in /proc/kallsyms")
def _() -> str:
    with open("/proc/kallsyms", encoding="ascii", errors="replace") as symbols:
        for _line, text in zip(range(200), symbols, strict=False):
            if int(text.split()[0], 16):
                return text.strip()
    raise Denied("the addresses are blotted out")


@attempt("files", "leave the control group")
def _() -> str:
    groups = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids"]
    try:
        with open("/proc/self/cgroup", encoding="ascii", errors="replace") as lines:
            groups += ["/sys/fs/cgroup" + line.rstrip().split(":", 2)[2] for line in lines]
    except OSError:
        pass
    return try_each(groups, lambda path: opens(f"{path}/cgroup.procs", os.O_WRONLY))


@attempt("files", "shield itself from the out-of-memory killer")
def _() -> str:
    fd = os.open("/proc/self/oom_score_adj", os.O_RDWR)
    before = os.read(fd, 32)
    os.pwrite(fd, b"-1000", 0)
    os.pwrite(fd, before, 0)
    return f"oom_score_adj went from {before.strip().decode()} to -1000"


@attempt("files", "write its own memory through /proc/self/mem")
def _() -> str:
    page = buffer(b"before")
    fd = os.open("/proc/self/mem", os.O_RDWR)
    os.pwrite(fd, b"after!", address(page))
    os.close(fd)
    return f"memory now holds {page.raw!r}"


@attempt("files", "learn host paths from /proc/self/mountinfo")
def _() -> str:
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
        sources = [line.split()[3] for line in lines]
    told = [source for source in sources if source != "/"]
    if not told:
        raise Denied(f"{len(sources)} mounts, none with a path on the host")
    return f"{len(sources)} mounts, as {told[:3]}"


# --- Files: making new ones, and its own program -------------------------------------------------


def making(name: str, make: Callable[[str], Any], remove: Callable[[str], None]) -> None:
    def one(place: str) -> str:
        path = fresh(place)
        make(path)
        try:
            remove(path)
        except OSError as error:
            return f"made, and then could not be removed: {reason_of(error)}"
        return "made and removed"

    register("files", name, lambda: try_each(writable_places(), one))


def make_file(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


making("create a file anywhere", make_file, os.unlink)
making("create a directory anywhere", os.mkdir, os.rmdir)
making("create a symbolic link anywhere", lambda p: os.symlink("/etc/shadow", p), os.unlink)
making("create a named pipe anywhere", os.mkfifo, os.unlink)
making("create a socket file anywhere", make_socket, os.unlink)
making(
    "create a device node for memory",
    lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 1)),
    os.unlink,
)
making(
    "create a device node for a disk",
    lambda path: os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(8, 0)),
    os.unlink,
)


@attempt("files", "create a nameless file anywhere (O_TMPFILE)")
def _() -> str:
    return try_each(
        writable_places(),
        lambda place: close_later(os.open(place, os.O_TMPFILE | os.O_RDWR, 0o600)),
    )


@attempt("files", "make hard links beside its program and libraries")
def _() -> str:
    def one(path: str) -> str:
        target = fresh(os.path.dirname(path))
        os.link(path, target)
        os.unlink(target)
        return "a hard link could be made beside it"

    return try_each(program_files(), one)


def program_files() -> list[str]:
    files = [sys.executable, os.path.realpath(sys.executable), os.__file__, socket.__file__]
    libraries = ("libc.so.6", "libm.so.6", "libz.so.1", "libffi.so.8", "libpthread.so.0")
    folders = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib")
    files += [f"{folder}/{library}" for folder in folders for library in libraries]
    files += ["/lib64/ld-linux-x86-64.so.2", os.path.abspath(sys.argv[0])]
    files += [file for file in (getattr(m, "__file__", "") for m in (mmap, ctypes)) if file]
    return [path for path in dict.fromkeys(files) if path and os.path.exists(path)]


@attempt("files", "open its program and libraries for writing")
def _() -> str:
    def one(path: str) -> str:
        return past_permission(lambda: opens(path, os.O_WRONLY), errno.ETXTBSY)

    return try_each(program_files(), one)


@attempt("files", "change the mode of its program and libraries")
def _() -> str:
    def one(path: str) -> str:
        os.chmod(path, stat.S_IMODE(os.stat(path).st_mode))
        return "chmod to the present mode was accepted"

    return try_each(program_files(), one)


@attempt("files", "write its program through /proc/self/exe")
def _() -> str:
    return past_permission(lambda: opens("/proc/self/exe", os.O_WRONLY), errno.ETXTBSY)


@attempt("files", "open the memory image for writing")
def _() -> str:
    return try_each(as_list(T.memory), lambda path: opens(path, os.O_RDWR))


@attempt("files", "change the length, mode or owner of the memory image by its path")
def _() -> str:
    def one(path: str) -> str:
        now = os.stat(path)
        changes: dict[str, Callable[[], None]] = {
            "truncate": lambda: os.truncate(path, now.st_size),
            "chmod": lambda: os.chmod(path, stat.S_IMODE(now.st_mode)),
            "chown": lambda: os.chown(path, now.st_uid, now.st_gid),
        }
        return try_each(changes, lambda change: changes[change]())

    return try_each(as_list(T.memory), one)


# --- Files: misuse of the descriptors it holds ---------------------------------------------------


def on_descriptors(what: str, one: Callable[[int], str | None], *kinds: str) -> None:
    """Register `one` for the read-only layers, the writable files, or other kinds it holds."""
    chosen: dict[str, Callable[[], list[int]]] = {
        "layers": lambda: T.layers,
        "overlay, console and log": lambda: T.writable,
        "console and log": lambda: T.traces,
        "overlay": lambda: T.overlay,
        "sockets": lambda: list(T.sockets.values()),
    }
    for kind in kinds or ("layers", "overlay, console and log"):
        fds = chosen[kind]
        register("files", f"{what}: {kind}", lambda fds=fds: try_each(fds(), one))  # type: ignore[misc]


def reopen_writable(fd: int) -> str:
    return try_each(
        [f"/proc/self/fd/{fd}", f"/dev/fd/{fd}"],
        lambda path: close_later(os.open(path, os.O_RDWR | os.O_NONBLOCK)),
    )


def change_mode(fd: int) -> None:
    os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode))


def change_owner(fd: int) -> str:
    now = os.fstat(fd)
    os.fchown(fd, now.st_uid, now.st_gid)
    return "fchown to the present owner was accepted"


def change_xattr(fd: int) -> None:
    os.setxattr(fd, b"user.standin", b"1")
    os.removexattr(fd, b"user.standin")


def change_times(fd: int) -> None:
    now = os.fstat(fd)
    os.utime(fd, ns=(now.st_atime_ns, now.st_mtime_ns))


def drop_append(fd: int) -> str:
    before = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not before & os.O_APPEND:
        raise Denied("not tried: it is not open for appending")
    fcntl.fcntl(fd, fcntl.F_SETFL, before & ~os.O_APPEND)
    after = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, before)
    if after & os.O_APPEND:
        raise Denied("O_APPEND stayed")
    return "O_APPEND went; what was written may be rewritten"


def not_append_only(fd: int) -> str:
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
        raise Denied("open for appending only")
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise Denied("not a regular file")
    return "earlier lines can be overwritten in place"


def change_flags(fd: int) -> str:
    before = struct.unpack("i", fcntl.ioctl(fd, 0x80086601, b"\0" * 4))[0]
    fcntl.ioctl(fd, 0x40086602, struct.pack("i", before ^ 0x40))  # the "no dump" flag
    fcntl.ioctl(fd, 0x40086602, struct.pack("i", before))
    return "inode flags were changed and changed back"


def change_project(fd: int) -> str:
    attributes = bytearray(fcntl.ioctl(fd, 0x801C581F, b"\0" * 28))
    before = bytes(attributes)
    project = struct.unpack_from("=I", attributes, 12)[0]
    struct.pack_into("=I", attributes, 12, project + 1)
    fcntl.ioctl(fd, 0x401C5820, bytes(attributes))
    fcntl.ioctl(fd, 0x401C5820, before)
    return "the quota project was changed and changed back"


def same_length(fd: int) -> str:
    os.ftruncate(fd, os.fstat(fd).st_size)
    return "ftruncate (to the present length) was accepted"


def punch_hole(fd: int) -> str:
    end = os.fstat(fd).st_size + MIB
    call("fallocate", fd, 3, end, 4096)
    return "a hole (beyond the end) was punched"


def link_back(fd: int) -> str:
    def one(place: str) -> str:
        path = fresh(place)
        try:
            call("linkat", fd, b"", AT_FDCWD, os.fsencode(path), AT_EMPTY_PATH)
        except OSError:
            source = f"/proc/self/fd/{fd}".encode()
            call("linkat", AT_FDCWD, source, AT_FDCWD, os.fsencode(path), 0x400)
        os.unlink(path)
        return "linked and unlinked"

    return try_each(writable_places(), one)


def by_handle(fd: int) -> str:
    handle = buffer(struct.pack("=Ii", 128, 0) + b"\0" * 128)
    mount = buffer(4)
    call("name_to_handle_at", fd, b"", handle, mount, AT_EMPTY_PATH)
    return close_later(call("open_by_handle_at", fd, handle, os.O_RDWR | os.O_NONBLOCK))


def root_by_handle(fd: int) -> str:
    """The guess behind `shocker`: handles of the root directory of usual file systems."""
    guesses = [struct.pack("=IiII", 8, 1, inode, 0) for inode in (2, 128, 64, 96, 256, 1)]
    guesses.append(struct.pack("=IiQI", 12, 0x81, 128, 0))
    flags = os.O_RDONLY | os.O_DIRECTORY

    def one(guess: bytes) -> str:
        return close_later(call("open_by_handle_at", fd, buffer(guess), flags))

    return try_each(guesses, one)


def take_lease(fd: int) -> str:
    def one(kind: int) -> str:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return "a lease, which holds up others that open it"

    return try_each([fcntl.F_WRLCK, fcntl.F_RDLCK], one)


def lock_whole(fd: int) -> str:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_UN)
    return "an exclusive flock"


def lock_range(fd: int) -> str:
    def one(pair: tuple[str, int, int]) -> str:
        lock = struct.pack("=hhxxxxqqixxxx", pair[2], 0, 0, 0, 0)
        fcntl.fcntl(fd, pair[1], lock)
        fcntl.fcntl(fd, pair[1], struct.pack("=hhxxxxqqixxxx", fcntl.F_UNLCK, 0, 0, 0, 0))
        return "granted"

    kinds = [("write lock", 37, fcntl.F_WRLCK), ("read lock", 37, fcntl.F_RDLCK)]
    kinds.append(("posix write lock", fcntl.F_SETLK, fcntl.F_WRLCK))
    return try_each(kinds, one)


on_descriptors("reopen for writing through /proc/self/fd", reopen_writable, "layers")
on_descriptors("reopen through /proc/self/fd without O_APPEND", reopen_writable, "console and log")
on_descriptors("change the mode", change_mode)
on_descriptors("change the owner", change_owner)
on_descriptors("set an extended attribute", change_xattr)
on_descriptors("change the times", change_times)
on_descriptors("change inode flags", change_flags)
on_descriptors("change the quota project", change_project)
on_descriptors("drop O_APPEND with fcntl", drop_append, "console and log")
on_descriptors("overwrite earlier output", not_append_only, "console and log")
on_descriptors("truncate", same_length, "layers", "console and log")
on_descriptors("punch a hole", punch_hole, "layers", "console and log")
on_descriptors("make a name for a descriptor (linkat)", link_back)
on_descriptors("open again by file handle", by_handle)
on_descriptors("open the root of the file system by a guessed handle", root_by_handle)
on_descriptors("take a lease", take_lease)
on_descriptors("take an exclusive flock", lock_whole, "layers")
on_descriptors("take record locks", lock_range, "layers")


def start_of(fd: int) -> bytes:
    data = os.pread(fd, 16, 0)
    if not data:
        raise Denied("not tried: it is empty")
    return data


def write_same(fd: int) -> str:
    data = start_of(fd)
    return f"{os.pwrite(fd, data, 0)} bytes"


def map_shared_writable(fd: int) -> str:
    map_raw(fd, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED)
    return "mapped"


def make_mapping_writable(fd: int) -> str:
    where = map_raw(fd, mmap.PROT_READ, mmap.MAP_SHARED)
    call("mprotect", where, 4096, mmap.PROT_READ | mmap.PROT_WRITE)
    return "mprotect made it writable"


def splice_into(fd: int) -> str:
    data = start_of(fd)
    reader, writer = os.pipe()
    os.write(writer, data)
    return f"{os.splice(reader, fd, len(data), offset_dst=0)} bytes"


def copy_range_into(fd: int) -> str:
    data = start_of(fd)
    return f"{os.copy_file_range(filled(data), fd, len(data), 0, 0)} bytes"


def sendfile_into(fd: int) -> str:
    data = start_of(fd)
    before = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        os.lseek(fd, 0, os.SEEK_SET)
        return f"{os.sendfile(fd, filled(data), 0, len(data))} bytes"
    finally:
        os.lseek(fd, before, os.SEEK_SET)


def clone_into(fd: int) -> str:
    fcntl.ioctl(fd, 0x40049409, fd)  # onto itself: only the permission would show
    return "FICLONE was accepted"


def spliced_pages(fd: int) -> str:
    """Pages of a layer in a pipe must not be writable through vmsplice with the gift flag."""
    reader, writer = os.pipe()
    os.splice(fd, writer, 16, offset_src=0)
    page = buffer(4096)
    vector = buffer(struct.pack("=QQ", address(page), 16))
    call("vmsplice", reader, vector, 1, 0)
    before = os.pread(fd, 16, 0)
    page.raw = b"\xff" * 4096
    if os.pread(fd, 16, 0) != before:
        return "the page of the layer itself was changed"
    raise Denied("a copy only")


for _what, _one in (
    ("write", write_same),
    ("map shared and writable", map_shared_writable),
    ("map shared, then mprotect to writable", make_mapping_writable),
    ("splice into", splice_into),
    ("copy_file_range into", copy_range_into),
    ("sendfile into", sendfile_into),
    ("clone blocks into (FICLONE)", clone_into),
    ("get at cached pages with splice and vmsplice", spliced_pages),
):
    on_descriptors(_what, _one, "layers")


@attempt("files", "have the kernel signal others about a descriptor (F_SETOWN, SIGIO)")
def _() -> str:
    mine, theirs = socket.socketpair()

    def one(pid: int) -> str:
        fcntl.fcntl(mine, fcntl.F_SETOWN, pid)
        fcntl.fcntl(mine, 10, signal.SIGURG)  # F_SETSIG; ignored by default
        os.kill(pid, 0)  # the same rule decides when the signal is sent
        fcntl.fcntl(mine, fcntl.F_SETFL, os.O_NONBLOCK | fcntl.FASYNC)
        theirs.send(b"x")
        return "SIGURG was sent"

    return for_pids(one)


@attempt("files", "watch host paths with inotify")
def _() -> str:
    fd = call("inotify_init1", 0)
    paths = T.host_paths + [os.path.dirname(path) for path in T.host_paths if path.count("/") > 1]
    return try_each(paths, lambda p: str(call("inotify_add_watch", fd, os.fsencode(p), 0xFFF)))


# --- Signals and processes -----------------------------------------------------------------------


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


# --- Namespaces and mounts -----------------------------------------------------------------------

NEW = {
    "mount": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000,
    "user": 0x10000000, "pid": 0x20000000, "network": 0x40000000, "time": 0x00000080,
}  # fmt: skip


def clone_into_new(flag: int) -> str:
    pid = call("clone", flag | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return "a process in it was made"


def clone3_into_new(flag: int) -> str:
    arguments = buffer(struct.pack("=8Q", flag, 0, 0, 0, signal.SIGCHLD, 0, 0, 0))
    pid = call("clone3", arguments, 64)
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


# --- Credentials ---------------------------------------------------------------------------------


def becoming(name: str, act: Callable[[], Any]) -> None:
    def run() -> str:
        before = (os.getresuid(), os.getresgid(), os.getgroups())
        act()
        after = (os.getresuid(), os.getresgid(), os.getgroups())
        return "nothing to gain, it was so already" if before == after else f"now {after}"

    register("credentials", name, run, True)


KEEP = -1
becoming("setuid(0)", lambda: call("setuid", 0))
becoming("setresuid(-1, 0, -1)", lambda: call("setresuid", KEEP, 0, KEEP))
becoming("setgid(0)", lambda: call("setgid", 0))
becoming("setresgid(-1, 0, -1)", lambda: call("setresgid", KEEP, 0, KEEP))
becoming("setgroups([0])", lambda: os.setgroups([0]))
becoming("setgroups([])", lambda: os.setgroups([]))


@attempt("credentials", "become the neighbour's user", sticky=True)
def _() -> str:
    if T.neighbour_uid is None:
        raise Denied("not tried: no user was named")
    if T.neighbour_uid == os.geteuid():
        return "it is the same user already"
    call("setresuid", T.neighbour_uid, T.neighbour_uid, T.neighbour_uid)
    return "done"


def file_identity(name: str) -> None:
    def run() -> str:
        call(name, 0)
        now = call(name, 2**32 - 1)
        if now != 0:
            raise Denied(f"stayed {now}")
        return "it is 0"

    register("credentials", f"{name}(0)", run, True)


file_identity("setfsuid")
file_identity("setfsgid")


@attempt("credentials", "hold any capability")
def _() -> str:
    effective, permitted, inheritable = capability_sets()
    if not effective | permitted | inheritable:
        raise Denied("all sets are empty")
    return f"effective {effective:#x}, permitted {permitted:#x}, inheritable {inheritable:#x}"


@attempt("credentials", "give itself every capability (capset)", sticky=True)
def _() -> str:
    everything = struct.pack("=6I", *[2**32 - 1] * 3, *[0x1FF] * 3)
    call("capset", buffer(struct.pack("=II", 0x20080522, 0)), buffer(everything))
    return f"effective {capability_sets()[0]:#x}"


@attempt("credentials", "give itself one capability (capset CAP_SYS_ADMIN)", sticky=True)
def _() -> str:
    wanted = struct.pack("=6I", *[1 << 21] * 3, 0, 0, 0)
    call("capset", buffer(struct.pack("=II", 0x20080522, 0)), buffer(wanted))
    return f"effective {capability_sets()[0]:#x}"


@attempt("credentials", "raise an ambient capability", sticky=True)
def _() -> str:
    return try_each(range(41), lambda capability: str(call("prctl", 47, 2, capability, 0, 0)))


@attempt("credentials", "keep capabilities over exec (securebits)", sticky=True)
def _() -> str:
    now = call("prctl", 27, 0, 0, 0, 0)
    return f"set to the present {now}: {call('prctl', 28, now, 0, 0, 0)}"


@attempt("credentials", "run programs that change the user")
def _() -> str:
    folders = ("/bin", "/usr/bin", "/sbin", "/usr/sbin", "/usr/lib/openssh")
    names = ("su", "sudo", "passwd", "mount", "newgrp", "chsh", "gpasswd", "pkexec", "fusermount3")

    def one(path: str) -> str:
        if not os.stat(path).st_mode & (stat.S_ISUID | stat.S_ISGID):
            raise Denied("not set-id")
        if call("prctl", 39, 0, 0, 0, 0):
            raise Denied("no_new_privs")
        if os.statvfs(path).f_flag & os.ST_NOSUID:
            raise Denied("nosuid mount")
        exits_with([path, "--help"], 0)
        return "it ran with its bits"

    return try_each([f"{folder}/{name}" for folder in folders for name in names], one)


@attempt("credentials", "drop no_new_privs")
def _() -> str:
    try:
        call("prctl", 38, 0, 0, 0, 0)
    except OSError as error:
        refusal = error_name(error.errno)
    else:
        refusal = "accepted"
    if call("prctl", 39, 0, 0, 0, 0):
        raise Denied(f"it stayed ({refusal})")
    return "it is not set"


@attempt("credentials", "run without a system call filter")
def _() -> str:
    mode = call("prctl", 21, 0, 0, 0, 0)
    if mode:
        raise Denied(f"seccomp mode {mode}")
    return "no filter is set"


@attempt("credentials", "take the system call filter off", sticky=True)
def _() -> str:
    if not call("prctl", 21, 0, 0, 0, 0):
        raise Denied("not tried: no filter is set")
    return try_each([0, 1], lambda mode: str(call("prctl", 22, mode, 0, 0, 0)))


@attempt("credentials", "suspend the filter of a child by tracing it")
def _() -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        return f"PTRACE_O_SUSPEND_SECCOMP: {ptrace(0x4206, pid, 0, 1 << 21)}"
    finally:
        os.close(writer)


@attempt("credentials", "make keys and keyrings")
def _() -> str:
    makers: dict[str, Callable[[], int]] = {
        "add_key": lambda: call("add_key", b"user", b"standin", b"x", 1, -2),
        "session keyring": lambda: call("keyctl", 1, b"standin"),
    }
    return try_each(makers, lambda name: f"returned {makers[name]()}")


@attempt("credentials", "reach the keyrings of its user and session")
def _() -> str:
    return try_each([-3, -4, -5], lambda ring: str(call("keyctl", 0, ring, 0)))


@attempt("credentials", "read keys of others (keyctl by number, /proc/keys)")
def _() -> str:
    with open("/proc/keys", encoding="ascii", errors="replace") as lines:
        numbers = [int(line.split()[0], 16) for line in lines]
    # With no room given, the kernel tells the length and hands over nothing.
    return try_each(numbers, lambda n: f"{call('keyctl', 11, n, None, 0)} bytes")


@attempt("credentials", "have a key requested by a helper of the kernel (request_key)")
def _() -> str:
    return str(call("request_key", b"user", b"standin-none", b"x", 0))


@attempt("credentials", "change personality", sticky=True)
def _() -> str:
    values = {"no address randomization": 0x40000, "read implies exec": 0x400000, "32 bit": 8}
    return try_each(values, lambda name: str(call("personality", values[name])))


@attempt("credentials", "change its memory map (PR_SET_MM)")
def _() -> str:
    return past_permission(lambda: call("prctl", 35, 13, -1, 0, 0), errno.EBADF)


@attempt("credentials", "turn processor mitigations off (PR_SET_SPECULATION_CTRL)", sticky=True)
def _() -> str:
    kinds = {"store bypass": 0, "indirect branch": 1}
    return try_each(kinds, lambda kind: str(call("prctl", 53, kinds[kind], 2, 0, 0)))


@attempt("credentials", "be excused from memory reclaim (PR_SET_IO_FLUSHER)", sticky=True)
def _() -> str:
    return str(call("prctl", 57, 1, 0, 0, 0))


# --- Sockets -------------------------------------------------------------------------------------


def family(
    name: str, number: int, kind: int = socket.SOCK_DGRAM, protocol: int = 0, what: str = ""
) -> None:
    def run() -> str:
        socket.socket(number, kind, protocol).close()
        return what or "the socket was made"

    register("sockets", f"make a socket: {name}", run)


NETLINK = 16
family("raw IPv4 (ICMP)", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
family("raw IPv4 (any protocol)", socket.AF_INET, socket.SOCK_RAW, 255)
family("raw IPv6", socket.AF_INET6, socket.SOCK_RAW, 58)
family("ping", socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
family("packet (raw)", 17, socket.SOCK_RAW, 0x0300)
family("packet (datagram)", 17, socket.SOCK_DGRAM, 0)
family("netlink, kernel events", NETLINK, socket.SOCK_RAW, 15)
family("netlink, audit", NETLINK, socket.SOCK_RAW, 9)
family("netlink, packet filter", NETLINK, socket.SOCK_RAW, 12)
family("netlink, generic", NETLINK, socket.SOCK_RAW, 16)
family("netlink, connector", NETLINK, socket.SOCK_RAW, 11)
family("netlink, xfrm", NETLINK, socket.SOCK_RAW, 6)
family("netlink, crypto", NETLINK, socket.SOCK_RAW, 21)
family("vsock", 40, socket.SOCK_STREAM)
family("kernel crypto (ALG)", 38, socket.SOCK_SEQPACKET)
family("Bluetooth (L2CAP)", 31, socket.SOCK_SEQPACKET, 0)
family("Bluetooth (HCI)", 31, socket.SOCK_RAW, 1)
family("XDP", 44, socket.SOCK_RAW)
family("TIPC", 30, socket.SOCK_SEQPACKET)
family("RDS", 21, socket.SOCK_SEQPACKET)
family("QIPCRTR", 42)
family("CAN", 29, socket.SOCK_RAW, 1)
family("IPsec keys (PF_KEY)", 15, socket.SOCK_RAW, 2)
family("SMC", 43, socket.SOCK_STREAM)
family("KCM", 41, socket.SOCK_SEQPACKET)
family("SCTP", socket.AF_INET, socket.SOCK_STREAM, 132)
family("DCCP", socket.AF_INET, 6, 33)
family("multipath TCP", socket.AF_INET, socket.SOCK_STREAM, 262)
family("L2TP", socket.AF_INET, socket.SOCK_DGRAM, 115)


@attempt("sockets", "make a socket: rare and old families")
def _() -> str:
    numbers = [
        3,
        4,
        5,
        6,
        9,
        11,
        12,
        18,
        19,
        20,
        22,
        23,
        24,
        26,
        27,
        28,
        33,
        34,
        35,
        36,
        37,
        39,
        45,
    ]
    kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)

    def one(number: int) -> None:
        for kind in kinds:
            try:
                socket.socket(number, kind, 0).close()
            except OSError:
                if kind == kinds[-1]:
                    raise
            else:
                return

    return try_each(numbers, one)


@attempt("sockets", "see network interfaces besides loopback")
def _() -> str:
    found = interfaces()
    if not found:
        raise Denied("loopback only, or nothing")
    return ", ".join(found)


def netlink_dump(protocol: int, request: int, body: bytes) -> int:
    """Ask a netlink protocol to list its things, and count them."""
    with socket.socket(NETLINK, socket.SOCK_RAW, protocol) as link:
        link.settimeout(0.5)
        link.send(struct.pack("=IHHII", 16 + len(body), request, 0x301, 1, 0) + body)
        count = 0
        while True:
            data = link.recv(1 << 16)
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                if kind == 3:
                    return count
                if kind == 2:
                    number = -struct.unpack_from("=i", data, 16)[0]
                    raise OSError(number, os.strerror(number))
                count += 1
                data = data[max(16, (length + 3) & ~3) :]


@attempt("sockets", "list links and routes over netlink")
def _() -> str:
    links = netlink_dump(0, 18, struct.pack("=BxHiII", 0, 0, 0, 0, 0))
    if links <= 1:
        raise Denied(f"{links} link (loopback only)")
    return f"{links} links"


@attempt("sockets", "list the sockets of others over netlink (sock_diag)")
def _() -> str:
    def one(number: int) -> str:
        if number == socket.AF_UNIX:
            body = struct.pack("=BBHIIIII", number, 0, 0, 2**32 - 1, 0, 1, 0, 0)
        else:
            body = struct.pack("=BBBBI48x", number, 6, 0, 0, 2**32 - 1)
        count = netlink_dump(4, 20, body)
        if count == 0:
            raise Denied("none to be seen")
        return f"{count} sockets"

    return try_each([socket.AF_INET, socket.AF_INET6, socket.AF_UNIX], one)


STREAMS = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)


def connect_unix(name: str | bytes) -> str:
    last: OSError = OSError(errno.ECONNREFUSED, "")
    for kind in STREAMS:
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.setblocking(False)
            try:
                client.connect(name)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINPROGRESS):
                    return f"its queue was reached ({error_name(error.errno)})"
                last = error
            else:
                return "connected"
    raise last


def abstract_name(name: str) -> bytes:
    return b"\0" + os.fsencode(name.lstrip("\0@"))


@attempt("sockets", "connect to unix sockets of others by path")
def _() -> str:
    return try_each(T.unix_sockets, connect_unix)


@attempt("sockets", "connect to unix sockets of others by climbing paths")
def _() -> str:
    prefixes = ("../" * 20, "/proc/1/root/", "/proc/self/root/", f"/proc/{MAIN_PARENT}/root/")
    paths = [prefix + path.lstrip("/") for prefix in prefixes for path in T.unix_sockets]
    return try_each(paths, connect_unix)


@attempt("sockets", "connect to abstract sockets of others")
def _() -> str:
    return try_each(T.abstract, lambda name: connect_unix(abstract_name(name)))


@attempt("sockets", "send a datagram to unix sockets of others")
def _() -> str:
    def one(name: str | bytes) -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            return f"{sender.sendto(b'x', name)} byte"

    return try_each([*T.unix_sockets, *map(abstract_name, T.abstract)], one)


def squat(name: str) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(abstract_name(name))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "the name is taken, so the name space is shared"
            raise
    raise Denied("bound, in a name space of its own")


@attempt("sockets", "share the abstract name space with others (bind their names)")
def _() -> str:
    return try_each(T.abstract, squat)


@attempt("sockets", "listen on an abstract name where others may connect")
def _() -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"\0standin-%d" % os.getpid())
        listener.listen(1)
        if not T.abstract:
            return "it listens; whether others share the name space cannot be told"
        return f"it listens, and {try_each(T.abstract, squat)}"


def version_of(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def connect_tcp(target: tuple[str, int], kind: int = socket.SOCK_STREAM, protocol: int = 0) -> str:
    with socket.socket(version_of(target[0]), kind, protocol) as client:
        client.setblocking(False)
        result = client.connect_ex(target)
        if result == errno.EINPROGRESS:
            if select.select([], [client], [], 0.3)[1]:
                result = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                return "connected" if result == 0 else f"sent, answer {error_name(result)}"
            return "sent (EINPROGRESS)"
        if result:
            raise OSError(result, os.strerror(result))
        return "connected"


@attempt("sockets", "connect to TCP services")
def _() -> str:
    return try_each(T.tcp, connect_tcp)


@attempt("sockets", "connect to TCP services with fast open (sendto without connect)")
def _() -> str:
    def one(target: tuple[str, int]) -> str:
        with socket.socket(version_of(target[0]), socket.SOCK_STREAM) as client:
            client.setblocking(False)
            try:
                return f"{client.sendto(b'x', socket.MSG_FASTOPEN, target)} byte"
            except BlockingIOError:
                return "sent (EINPROGRESS)"

    return try_each(T.tcp, one)


@attempt("sockets", "connect to TCP services over multipath TCP, SMC or SCTP")
def _() -> str:
    def one(pair: tuple[tuple[str, int], int]) -> str:
        return connect_tcp(pair[0], socket.SOCK_STREAM, pair[1])

    return try_each([(target, protocol) for target in T.tcp for protocol in (262, 132)], one)


@attempt("sockets", "connect to TCP services over IPv4 written as IPv6")
def _() -> str:
    targets = [(f"::ffff:{host}", port) for host, port in T.tcp if ":" not in host]
    return try_each(targets, connect_tcp)


@attempt("sockets", "send to UDP services")
def _() -> str:
    def one(target: tuple[str, int]) -> str:
        with socket.socket(version_of(target[0]), socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            return f"{sender.sendto(b'x', target)} byte"

    return try_each(T.udp, one)


@attempt("sockets", "ask a name server, and broadcast")
def _() -> str:
    def one(target: tuple[str, int]) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            return f"{sender.sendto(b'', target)} bytes, sent"

    return try_each(
        [("127.0.0.53", 9), ("255.255.255.255", 9), ("169.254.169.254", 9), ("224.0.0.251", 9)],
        one,
    )


@attempt("sockets", "connect to the host over vsock (CID 0, 1 and 2)")
def _() -> str:
    return try_each(range(3), connect_vsock)


@attempt("sockets", "connect to other guests over vsock")
def _() -> str:
    return try_each(range(3, 12), connect_vsock)


def connect_vsock(cid: int) -> str:
    with socket.socket(40, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect((cid, 1024))
        except BlockingIOError:
            return "sent (EINPROGRESS)"
        except ConnectionResetError:
            return "answered with a reset, so it was reached"
        return "connected"


@attempt("sockets", "listen on a port for all of the network")
def _() -> str:
    def one(host: str) -> str:
        with socket.socket(version_of(host), socket.SOCK_STREAM) as listener:
            listener.bind((host, 0))
            listener.listen(1)
        if not interfaces():
            raise Denied("bound, but in a network with nobody in it")
        return "it listened"

    return try_each(["0.0.0.0", "::"], one)


@attempt("sockets", "listen on a low port")
def _() -> str:
    def one(port: int) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("0.0.0.0", port))
        return "bound"

    return try_each([81, 783, 1023], one)


@attempt("sockets", "bind to addresses of the host")
def _() -> str:
    hosts = sorted({host for host, _ in T.tcp + T.udp if not host.startswith(("127.", "::1"))})

    def one(host: str) -> str:
        with socket.socket(version_of(host), socket.SOCK_DGRAM) as holder:
            holder.bind((host, 0))
        if not interfaces():  # an empty network takes any address
            raise Denied("bound, but in a network with nobody in it")
        return "bound"

    return try_each(hosts, one)


def socket_option(name: str, level: int, option: int, value: int | bytes) -> None:
    def run() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as plain:
            plain.setsockopt(level, option, value)
        return "set"

    register("sockets", f"set a socket option: {name}", run)


socket_option("IP_TRANSPARENT", 0, 19, 1)
socket_option("SO_BINDTODEVICE", socket.SOL_SOCKET, 25, b"lo\0")
socket_option("SO_MARK", socket.SOL_SOCKET, 36, 7)
socket_option("SO_PRIORITY above 6", socket.SOL_SOCKET, 12, 7)
socket_option("SO_RCVBUFFORCE", socket.SOL_SOCKET, 33, 1 << 20)
socket_option("SO_DEBUG", socket.SOL_SOCKET, 1, 1)
socket_option("upper layer TLS (kTLS)", socket.IPPROTO_TCP, 31, b"tls")


@attempt("sockets", "set a packet filter program on a socket (SO_ATTACH_FILTER)")
def _() -> str:
    program = buffer(struct.pack("=HBBI", 6, 0, 0, 2**32 - 1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plain:
        plain.setsockopt(socket.SOL_SOCKET, 26, struct.pack("=HxxxxxxQ", 1, address(program)))
    return "set"


@attempt("sockets", "change addresses and routes with ioctl")
def _() -> str:
    requests = {"SIOCSIFADDR": 0x8916, "SIOCSIFFLAGS": 0x8914, "SIOCSIFMTU": 0x8922}

    def one(name: str) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            request = struct.pack("16sHH20x", b"standin-none", socket.AF_INET, 0)
            return past_permission(
                lambda: fcntl.ioctl(control, requests[name], request), errno.ENODEV
            )

    return try_each(requests, one)


def held_sockets(one: Callable[[socket.socket], str | None]) -> str:
    def named(name: str) -> str | None:
        return one(socket.socket(fileno=os.dup(T.sockets[name])))

    return try_each(T.sockets, named)


def next_peer(held: socket.socket) -> socket.socket:
    """The peer of a held socket: itself if it is connected, else who connects within a moment."""
    if not held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return held
    if not select.select([held], [], [], 0.1)[0]:
        raise Denied("nobody connected")
    held.setblocking(False)
    return held.accept()[0]


def send_rights(what: str, descriptors: Callable[[], list[int]]) -> None:
    def one(held: socket.socket) -> str:
        peer = next_peer(held)
        peer.settimeout(0.5)
        fds = descriptors()
        if not fds:
            raise Denied("not tried: there is no such descriptor")
        socket.send_fds(peer, [b"\n"], fds[:1])
        return "sent to the peer"

    register("sockets", f"pass a descriptor to the daemon: {what}", lambda: held_sockets(one))


def directory_descriptor() -> list[int]:
    return [os.open("/", os.O_RDONLY | os.O_DIRECTORY)]


send_rights("a layer", lambda: T.layers)
send_rights("the root directory", directory_descriptor)
send_rights("a socket", lambda: [socket.socketpair()[0].detach()])


@attempt("sockets", "pass forged credentials to the daemon (SCM_CREDENTIALS)")
def _() -> str:
    def one(held: socket.socket) -> str:
        peer = next_peer(held)
        forged = struct.pack("=iII", 1, 0, 0)
        peer.sendmsg([b"\n"], [(socket.SOL_SOCKET, 2, forged)])
        return "sent"

    return held_sockets(one)


@attempt("sockets", "forge credentials at all (SCM_CREDENTIALS to itself)")
def _() -> str:
    here, there = socket.socketpair()
    there.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def one(forged: tuple[int, int, int]) -> str:
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, 2, struct.pack("=iII", *forged))])
        return "sent"

    me = (os.getpid(), os.getuid(), os.getgid())
    forgeries = [(MAIN_PARENT or 1, *me[1:]), (me[0], 0 if me[1] else 1, me[2])]
    forgeries += [(pid, *me[1:]) for pid in T.pids[:3]]
    return try_each(forgeries, one)


@attempt("sockets", "turn a held socket to another address (connect, bind again)")
def _() -> str:
    targets: list[str | bytes] = [*T.unix_sockets, b"\0standin-again"]

    def one(held: socket.socket) -> str:
        def move(target: str | bytes) -> str:
            try:
                held.connect(target)
            except OSError:
                held.bind(target)
            return "done"

        return try_each(targets, move)

    return held_sockets(one)


@attempt("sockets", "reach its own listening sockets as a client by their path")
def _() -> str:
    def one(held: socket.socket) -> str:
        name = held.getsockname()
        if not name:
            raise Denied("it has no name")
        return f"{name!r}: {connect_unix(name)}"

    return held_sockets(one)


@attempt("sockets", "read the names and makers of held sockets (a host path, a host pid)")
def _() -> str:
    def one(held: socket.socket) -> str:
        pid, uid, gid = struct.unpack(
            "=iII", held.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        return f"named {held.getsockname()!r}, made by pid {pid} uid {uid} gid {gid}"

    return held_sockets(one)


@attempt("sockets", "get a pidfd of the peer of a held socket (SO_PEERPIDFD)")
def _() -> str:
    def one(held: socket.socket) -> str:
        answer = held.getsockopt(socket.SOL_SOCKET, 77, 4)
        fd = struct.unpack("=i", answer)[0]
        call("pidfd_send_signal", fd, 0, None, 0)
        return "a pidfd that takes signals"

    return held_sockets(one)


# --- Kernel interfaces ---------------------------------------------------------------------------


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


# --- Exhaustion ----------------------------------------------------------------------------------


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


# --- What any process may do, and the honest one needs -------------------------------------------


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


# --- Running -------------------------------------------------------------------------------------


def say(line: dict[str, Any]) -> None:
    data = (json.dumps(line) + "\n").encode()
    while data:
        try:
            data = data[os.write(1, data) :]
        except BlockingIOError:
            select.select([], [1], [])


def outcome(one: Attempt) -> tuple[str, str]:
    try:
        return "allowed", one.run() or "done"
    except Exception as error:
        return "denied", reason_of(error)


def reap() -> None:
    """Orphans come to us where we are process 1."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except OSError:
        pass


def in_fork(one: Attempt) -> tuple[str, str]:
    """Run an attempt in a child; how it ends says what it did not."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        signal.alarm(HANG_SECONDS)
        answer = json.dumps(outcome(one)).encode() + b"\n"
        os.write(writer, answer)
        os._exit(0)
    os.close(writer)
    data = b""
    end = time.monotonic() + PARENT_SECONDS
    while not data.endswith(b"\n"):
        left = end - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            break
        part = os.read(reader, 1 << 16)
        if not part:
            break
        data += part
    os.close(reader)
    if not data.endswith(b"\n") and time.monotonic() >= end:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    reap()
    if data.endswith(b"\n"):
        got, how = json.loads(data)
        return got, how
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGALRM, signal.SIGKILL) and time.monotonic() > end - 3:
            return "denied", "hung"
        return "denied", f"killed by {signal.Signals(number).name}"
    return "denied", f"ended with {os.WEXITSTATUS(status)} and no answer"


def on_signal(number: int, _frame: object) -> None:
    if number == signal.SIGALRM:
        raise Denied("hung")
    raise Denied(f"stopped by {signal.Signals(number).name}")


def in_process(one: Attempt) -> tuple[str, str]:
    """Without fork: a kill ends everything, so say on stderr what is being tried."""
    try:
        os.write(2, f"trying: {one.name}\n".encode())
    except OSError:
        pass
    signal.alarm(HANG_SECONDS)
    try:
        return outcome(one)
    finally:
        signal.alarm(0)
        before = -1
        for fd in [*AT_START, 110_000]:  # close what the attempt left open
            if fd > before + 1:  # an empty range would close everything
                os.closerange(before + 1, fd)
            before = fd


def can_fork() -> str:
    """Empty if a child can be made, else why not."""
    try:
        pid = os.fork()
    except OSError as error:
        return error_name(error.errno)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return ""


def main() -> None:
    global T
    if sys.argv[1:] == ["--list"]:
        for one in ATTEMPTS:
            print(f"{one.group}\t{one.name}")
        return
    T = Targets(json.loads(sys.argv[1]) if len(sys.argv) > 1 else {})
    for fd in range(4096):
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            continue
        AT_START.append(fd)
    chosen = [one for one in ATTEMPTS if not T.only or one.name in T.only]
    chosen = [one for one in chosen if one.name not in T.skip]
    why = "asked for" if T.in_process else can_fork()
    if why:
        for number in (signal.SIGALRM, signal.SIGSYS):
            signal.signal(number, on_signal)
        chosen.sort(key=lambda one: (one.sticky, one.group == "namespaces"))
    for one in chosen:
        got, how = in_process(one) if why else in_fork(one)
        say({"group": one.group, "name": one.name, "got": got, "how": how[:400]})
    say({"done": True, "in_process": why} if why else {"done": True})


if __name__ == "__main__":
    main()
