"""Files that lie on the host: by path, through /proc, and in what the kernel shows."""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable

from ratoon.jail.attack.around import first_bytes, foreign_pids, opens
from ratoon.jail.attack.attempts import Denied, attempt, register, try_each
from ratoon.jail.attack.calls import AT_FDCWD, O_PATH, address, buffer, call, close_later
from ratoon.jail.attack.targets import AT_START, MAIN_PARENT, MAIN_PID, T


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
