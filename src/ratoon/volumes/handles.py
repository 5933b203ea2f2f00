"""File handles that nobody need remember: they name a file of a volume, now and after a restart.

A handle is the volume's id, the kernel's own handle of the file (name_to_handle_at(2)), and a MAC
over both with a key that the guest never sees. So a guest can name what it was shown, and nothing
else of the host's file system, and no table of open files must survive a fork or a crash.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import struct
from pathlib import Path

from blake3 import blake3

from ratoon.files import locked, write_durable

ID_BYTES = 8
MAC_BYTES = 16
#: Of NFS, version 3.
MAX_BYTES = 64
_MAX_KERNEL_BYTES = MAX_BYTES - ID_BYTES - MAC_BYTES - 4
_HEADER = struct.Struct("=Ii")  # handle_bytes, handle_type
_AT_EMPTY_PATH = 0x1000
KEY = "key"
_libc = ctypes.CDLL(None, use_errno=True)


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
        (kind,) = struct.unpack_from("=i", kernel)
        raw = _HEADER.pack(len(kernel) - 4, kind) + kernel[4:]
        flags = os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW
        return _checked(_libc.open_by_handle_at(self._root, raw, flags))

    def _seal(self, kernel: bytes) -> bytes:
        body = self._volume + kernel
        return body + self._mac(body)

    def _mac(self, body: bytes) -> bytes:
        return blake3(body, key=self._key).digest(MAC_BYTES)


def _kernel_handle(fd: int) -> bytes:
    """The handle's type and bytes (open_by_handle_at(2))."""
    buffer = ctypes.create_string_buffer(_HEADER.size + _MAX_KERNEL_BYTES)
    _HEADER.pack_into(buffer, 0, _MAX_KERNEL_BYTES, 0)
    mount_id = ctypes.c_int()
    result = _libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount_id), _AT_EMPTY_PATH)
    if result < 0 and ctypes.get_errno() == errno.EOVERFLOW:
        raise OSError(errno.EOPNOTSUPP, "file handles of this file system are too long")
    _checked(result)
    length, kind = _HEADER.unpack_from(buffer)
    return struct.pack("=i", kind) + buffer.raw[_HEADER.size : _HEADER.size + length]


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
