"""What is taken from a thread before it starts a program, in this order; each says what it is for.

The thread is the daemon's at first, and root. After the last step it can start a program and end;
there is no way back for it.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass

from ratoon import syscalls
from ratoon.jail import user_namespace
from ratoon.jail.filters import FAMILIES, filter_calls
from ratoon.syscalls import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUTS,
    MS_NODEV,
    MS_NOSUID,
    MS_RDONLY,
    MS_REMOUNT,
)

#: Where the tree lies in a cell's mount namespace. Who has only changed to a root below that of
#: his namespace may make no user namespaces (user_namespaces(7)).
ROOT = "/cell"
#: An empty directory of a tree: the names of files that a program is given many of are made in it.
FILES = "files"
#: linux/prctl.h
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_CAP_LAST = 63
#: linux/landlock.h: abstract unix sockets and signals, known from this version on.
_SCOPED, _SCOPED_SINCE = 3, 6


class LostName(FileNotFoundError):
    """A file that is to be mounted was removed: the kernel mounts none that has no name."""


@dataclass(frozen=True)
class Going:
    """Who goes in: `mounts` are descriptors of detached mounts, by where they go in the cell.

    `cell` is its mount namespace, `network` that of its network, or None for an empty one of its
    own; both are descriptors. `name` is the host name that it has.
    """

    cell: int
    mounts: dict[str, int]
    network: int | None
    #: None: it stays root, of a user namespace that has nobody else.
    uid: int | None
    name: str


@dataclass(frozen=True)
class Step:
    """`holds_back` says what whoever breaks into the program does not get because of it."""

    name: str
    holds_back: str
    take: Callable[[Going], None]
    #: Why it is left out on this host.
    missing: Callable[[], str | None] = lambda: None


def _enter(going: Going) -> None:
    syscalls.setns(going.cell, CLONE_NEWNS)
    # Each its own: what is mounted in it now is for this one alone.
    syscalls.unshare(CLONE_NEWNS)
    _make_names([place for place in going.mounts if place.startswith(f"{FILES}/")])
    for place, mount in going.mounts.items():
        try:
            syscalls.attach_mount(mount, f"{ROOT}/{place}")
        except FileNotFoundError:
            raise LostName(f"what was to be /{place} in a cell is gone") from None
    os.chroot(ROOT)
    os.chdir("/")


def _make_names(places: list[str]) -> None:
    """In FILES, to mount something on."""
    if not places:
        return
    directory, flags = f"{ROOT}/{FILES}", MS_NOSUID | MS_NODEV
    syscalls.mount("files", directory, "tmpfs", flags, "mode=555")
    for place in places:
        os.mknod(f"{ROOT}/{place}", stat.S_IFREG)
    syscalls.mount("none", directory, None, MS_REMOUNT | MS_RDONLY | flags)


def _enter_network(going: Going) -> None:
    if going.network is None:
        syscalls.unshare(CLONE_NEWNET)
    else:
        syscalls.setns(going.network, CLONE_NEWNET)


def _be_alone(going: Going) -> None:
    syscalls.unshare(CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS)
    socket.sethostname(going.name)


def _stop_gaining(going: Going) -> None:
    syscalls.prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _scope(going: Going) -> None:
    if _no_scopes() is None:
        syscalls.landlock(_SCOPED)


def _no_scopes() -> str | None:
    version = syscalls.landlock_version()
    if version >= _SCOPED_SINCE:
        return None
    return f"this kernel has version {version} of Landlock, and it takes {_SCOPED_SINCE}"


def _filter(going: Going) -> None:
    filter_calls()


def _drop_capabilities(going: Going) -> None:
    for capability in range(_CAP_LAST + 1):
        try:
            syscalls.prctl(_PR_CAPBSET_DROP, capability)
        except OSError:  # the kernel has no more
            break


def _become_nobody_else(going: Going) -> None:
    if going.uid is not None:
        syscalls.become(going.uid, going.uid)


def _nobody_else() -> str | None:
    if user_namespace.free_ids():
        return None
    return "this user has no subordinate ids (`uidmap`, /etc/subuid): it is he himself"


STEPS = (
    Step(
        "a network of its own, or that of its policy",
        "the host's networks and loopback; other sandboxes",
        _enter_network,
    ),
    Step(
        "a mount namespace with a copy of the program, its libraries and /dev/null, read-only, and "
        "the files that it is given; chroot",
        "all files of the host: the store, other sandboxes' images and sockets, /proc, /sys, /dev; "
        "user namespaces, and what can be had in those",
        _enter,
    ),
    Step(
        "process, IPC and host-name namespaces",
        "signals to others, ptrace, their memory and descriptors; shared memory and queues; "
        "the host's name",
        _be_alone,
    ),
    Step(
        "no new privileges",
        "set-id programs and file capabilities",
        _stop_gaining,
    ),
    Step(
        "Landlock scopes",
        "abstract unix sockets of, and signals to, whoever shares its network",
        _scope,
        _no_scopes,
    ),
    Step(
        "a filter for system calls",
        "kernel code that it has no use for: io_uring, BPF, keys, userfaultfd, modules, x32; "
        f"sockets other than {' and '.join(each.name for each in FAMILIES)}",
        _filter,
    ),
    Step(
        "an empty bounding set of capabilities",
        "every capability, by whatever way",
        _drop_capabilities,
    ),
    Step(
        "a user and group id that nobody else has",
        "changes to files that it was given open: it owns none; whatever root may do, or another "
        "sandbox",
        _become_nobody_else,
        _nobody_else,
    ),
)
