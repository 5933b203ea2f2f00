"""File handles that nobody need remember: they name a file of a volume, now and after a restart.

A handle is the volume's id, the kernel's own handle of the file (name_to_handle_at(2)), and a MAC
over both with a key that the guest never sees. So a guest can name what it was shown, and nothing
else of the host's file system, and no table of open files must survive a fork or a crash.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from pathlib import Path

from blake3 import blake3

from ratoon import syscalls
from ratoon.files import locked, write_durable

ID_BYTES = 8
MAC_BYTES = 16
#: Of NFS, version 3.
MAX_BYTES = 64
_MAX_KERNEL_BYTES = MAX_BYTES - ID_BYTES - MAC_BYTES - 4
#: Of a kernel's handle: its type, then its bytes.
_KIND = struct.Struct("=i")
KEY = "key"


class ForeignHandle(Exception):
    """It was not made for this volume, or was tampered with."""


def key_of(directory: Path) -> bytes:
    """The key of a store's handles, which is in `directory`; made where there is none yet."""
    directory.mkdir(mode=0o700, exist_ok=True)
    path = directory / f".{KEY}"
    with locked(directory / ".lock"):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            key = secrets.token_bytes(32)
            write_durable(path, key)
            return key


def volume_id(source: str, key: bytes) -> bytes:
    """The same for the same source, in all sandboxes of a store."""
    return blake3(os.fsencode(source), key=key).digest(ID_BYTES)


class Handles:
    """Makes and opens the handles of one volume; `root` is a descriptor of its directory."""

    def __init__(self, root: int, volume: bytes, key: bytes) -> None:
        self._root = root
        self._volume = volume
        self._key = key
        #: The root's own: it stays the same where the directory is replaced by another one.
        self.root = self._seal(b"")

    def of(self, fd: int) -> bytes:
        """The handle of an open file. OSError: its file system has none (EOPNOTSUPP)."""
        return self._seal(_kernel_handle(fd))

    def open(self, handle: bytes) -> int:
        """An O_PATH descriptor of what it names. ForeignHandle; OSError: ESTALE if it is gone."""
        body, mac = handle[:-MAC_BYTES], handle[-MAC_BYTES:]
        kernel = body[ID_BYTES:]
        if not secrets.compare_digest(self._mac(body), mac) or body[:ID_BYTES] != self._volume:
            raise ForeignHandle
        if not kernel:
            return os.dup(self._root)
        (kind,) = _KIND.unpack_from(kernel)
        flags = os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW
        return syscalls.open_handle(self._root, kind, kernel[_KIND.size :], flags)

    def _seal(self, kernel: bytes) -> bytes:
        body = self._volume + kernel
        return body + self._mac(body)

    def _mac(self, body: bytes) -> bytes:
        return blake3(body, key=self._key).digest(MAC_BYTES)


def _kernel_handle(fd: int) -> bytes:
    """The handle's type and bytes. OSError: its file system has none that fit (EOPNOTSUPP)."""
    try:
        kind, handle = syscalls.file_handle(fd, _MAX_KERNEL_BYTES)
    except OSError as error:
        if error.errno != errno.EOVERFLOW:
            raise
        what = "file handles of this file system are too long"
        raise OSError(errno.EOPNOTSUPP, what) from None
    return _KIND.pack(kind) + handle
