"""File handles that nobody need remember: they name a file of a volume, now and after a restart.

A handle is the volume's id, the kernel's own handle of the file (name_to_handle_at(2)), and a MAC
over both with a key that the guest never sees. So a guest can name what it was shown, and nothing
else of the host's file system, and no table of open files must survive a fork or a crash. How the
file is found again is another matter: `finding`.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from ratoon.files import locked, write_durable
from ratoon.machine.volumes import finding

ID_BYTES = 8
MAC_BYTES = 16
#: NFS, version 3, has no longer ones.
MAX_BYTES = ID_BYTES + finding.MAX_BYTES + MAC_BYTES
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
        """OSError: its file system has none (EOPNOTSUPP)."""
        self._root = root
        self._volume = volume
        self._key = key
        self._finder = finding.finder_of(root)
        #: The root's own: it stays the same where the directory is replaced by another one.
        self.root = self._seal(b"")

    def of(self, fd: int) -> bytes:
        """The handle of an open file. OSError: its file system has none (EOPNOTSUPP)."""
        return self._seal(finding.kernel_handle(fd))

    def open(self, handle: bytes) -> int:
        """An O_PATH descriptor of what it names. ForeignHandle; OSError: ESTALE if it is gone."""
        body, mac = handle[:-MAC_BYTES], handle[-MAC_BYTES:]
        kernel = body[ID_BYTES:]
        if not secrets.compare_digest(self._mac(body), mac) or body[:ID_BYTES] != self._volume:
            raise ForeignHandle
        return self._finder.open(kernel) if kernel else os.dup(self._root)

    def seen(self, directory: int, name: bytes) -> None:
        """Something has this name in an open directory now, whatever it was called before."""
        with suppress(OSError):  # it is gone again
            self._finder.seen(directory, name)

    def _seal(self, kernel: bytes) -> bytes:
        body = self._volume + kernel
        return body + self._mac(body)

    def _mac(self, body: bytes) -> bytes:
        return blake3(body, key=self._key).digest(MAC_BYTES)
