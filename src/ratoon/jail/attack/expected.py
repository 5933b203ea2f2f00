"""What the stand-in gets that is not its own, and why it does no harm; in docs/security.md, too."""

from __future__ import annotations

#: By the name of the attempt.
EXPECTED = {
    "list host directories": "`/etc` within its own root: the name `resolv.conf`",
    "watch host paths with inotify": "`/etc` within its own root: the name `resolv.conf`",
    "drop O_APPEND with fcntl: console and log": (
        "both are its own: what a broken QEMU says there is its own anyway"
    ),
    "truncate: console and log": (
        "both are its own: what a broken QEMU says there is its own anyway"
    ),
    "punch a hole: console and log": (
        "both are its own: what a broken QEMU says there is its own anyway"
    ),
    "take an exclusive flock: layers": "nobody else locks layers",
    "take record locks: layers": "nobody else locks layers",
    "take 2,000 file locks": "memory of the kernel's, which its control group counts",
    "make 1,000 timers": "as many as its limit for pending signals",
    "keep 1,000 descriptors in flight over a unix socket": "as many as its limit for open files",
    "find settings in the environment beyond the harmless": "where its libraries lie",
    "run its own program again": "it gains nothing by that; QEMU's own filter denies it besides",
    "run a program made in memory (memfd)": (
        "code that it can run anyway; QEMU's own filter denies it besides"
    ),
    "turn processor mitigations off (PR_SET_SPECULATION_CTRL)": (
        "for itself: it gives away its own memory alone"
    ),
    "set a socket option: SO_BINDTODEVICE": "within its network namespace, which has one interface",
    "set a packet filter program on a socket (SO_ATTACH_FILTER)": (
        "of its own sockets; the classic kind, which the kernel checks"
    ),
    "read the names and makers of held sockets (a host path, a host pid)": (
        "the path of its own directory of sockets"
    ),
    "seccomp: add a filter": "filters only take away, and QEMU lays its own",
    "seccomp: a filter with a listener": "filters only take away, and QEMU lays its own",
    "have no limit on processor time (RLIMIT_CPU)": (
        "a sandbox has as much as its control group lets it"
    ),
    "have no limit on memory to be seen (RLIMIT_AS, control group)": (
        "a sandbox has as much as its control group lets it"
    ),
    "reserve 1 TiB of addresses": "addresses are not memory",
    "use every processor (sched_setaffinity)": "its control group bounds its share",
}

_OWNER = "the user's own files, as it is his own process"
_NOTHING = "there is nobody else to be, and nothing to be gained by it"
_ALL_HIS = "a limit would count all processes of the user"
#: What it gets besides where there is one id, so that it is the user himself, without a capability.
EXPECTED_OF_OWN_ID = {
    **dict.fromkeys(
        (
            "change the mode: overlay, console and log",
            "change the owner: overlay, console and log",
            "set an extended attribute: overlay, console and log",
            "change the times: overlay, console and log",
            "change inode flags: overlay, console and log",
            "take a lease: overlay, console and log",
        ),
        _OWNER,
    ),
    "take a lease: layers": (
        "it may hold up others of this user's that open the same layer, for 45 s at most"
    ),
    **dict.fromkeys(
        ("setuid(0)", "setresuid(-1, 0, -1)", "setgid(0)", "setresgid(-1, 0, -1)", "setfsuid(0)"),
        _NOTHING,
    ),
    "setfsgid(0)": _NOTHING,
    "become the neighbour's user": (
        "it is that user; the namespaces and the root are what keeps them apart"
    ),
    "make 2,000 processes": _ALL_HIS,
    "make 2,000 threads": _ALL_HIS,
}
