"""The kernel's network namespaces, by descriptor: making one, and being in it for a moment.

A namespace lives as long as a process is in it or a descriptor refers to it. None has a name here,
so the kernel frees it, with the interfaces in it, when its last user dies (network_namespaces(7)).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

#: linux/sched.h
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def new_namespace() -> int:
    """A descriptor of a new namespace, empty but for a loopback that is down.

    PermissionError: only root can.
    """
    with _back_afterwards():
        _check(_libc.unshare(_CLONE_NEWNET))
        return _open_own()


@contextmanager
def entered(namespace: int) -> Iterator[None]:
    """Have the calling thread in `namespace`, and what it starts; costs microseconds.

    There must be no `await` in the block: other tasks would find themselves in there.
    """
    with _back_afterwards():
        _check(_libc.setns(namespace, _CLONE_NEWNET))
        yield


@contextmanager
def _back_afterwards() -> Iterator[None]:
    own = _open_own()
    try:
        yield
    finally:
        try:
            _check(_libc.setns(own, _CLONE_NEWNET))
        finally:
            os.close(own)


def _open_own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
