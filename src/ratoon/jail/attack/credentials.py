"""Other users, capabilities, privileges and keys."""

from __future__ import annotations

import errno
import os
import stat
import struct
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
from ratoon.jail.attack.calls import buffer, call, capability_sets, exits_with
from ratoon.jail.attack.processes import ptrace
from ratoon.jail.attack.targets import T


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
