"""The kernel's network namespaces, by descriptor: making one, and being in it for a moment.

A namespace lives as long as a process is in it or a descriptor refers to it. None has a name here,
so the kernel frees it, with the interfaces in it, when its last user dies (network_namespaces(7)).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ratoon.syscalls import CLONE_NEWNET, setns, unshare


def new_namespace() -> int:
    """A descriptor of a new namespace, empty but for a loopback that is down.

    PermissionError: only root can.
    """
    with _back_afterwards():
        unshare(CLONE_NEWNET)
        return _open_own()


@contextmanager
def entered(namespace: int) -> Iterator[None]:
    """Have the calling thread in `namespace`, and what it starts; costs microseconds.

    There must be no `await` in the block: other tasks would find themselves in there.
    """
    with _back_afterwards():
        setns(namespace, CLONE_NEWNET)
        yield


@contextmanager
def _back_afterwards() -> Iterator[None]:
    own = _open_own()
    try:
        yield
    finally:
        try:
            setns(own, CLONE_NEWNET)
        finally:
            os.close(own)


def _open_own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
