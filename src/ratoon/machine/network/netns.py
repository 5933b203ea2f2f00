"""The kernel's network namespaces, by descriptor: making one, and doing something in one.

A namespace lives as long as a process is in it or a descriptor refers to it. None has a name here,
so the kernel frees it, with the interfaces in it, when its last user dies (network_namespaces(7)).

Whoever goes into one is a thread that ends then: without root there is no way back to the host's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ratoon.jail.cell import in_own_thread
from ratoon.syscalls import CLONE_NEWNET, setns, unshare

T = TypeVar("T")

#: Of the namespace that the thread is in which writes to it.
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def new_namespace() -> int:
    """A descriptor of a new namespace, empty but for a loopback that is down.

    PermissionError: only root can, of the host or of a user namespace.
    """

    def make() -> int:
        unshare(CLONE_NEWNET)
        return _open_own()

    return in_own_thread(make)


def inside(namespace: int, work: Callable[[], T]) -> T:
    """What `work` returns or raises; it is done in `namespace`, and what it starts is there too.

    PermissionError: that belongs to another user namespace.
    """

    def enter() -> T:
        setns(namespace, CLONE_NEWNET)
        return work()

    return in_own_thread(enter)


def is_ours() -> bool:
    """Whether this thread may change the network that it is in; the host's is for its root."""
    own = _open_own()
    try:
        inside(own, lambda: None)
    except PermissionError:
        return False
    finally:
        os.close(own)
    return True


def _open_own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
