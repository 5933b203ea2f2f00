"""Layers and tarballs as streams: read once for the tree that they make, and once for content.

So no layer is unpacked to anywhere, and none is held. What a layer is compressed with, its first
bytes tell: manifests may be wrong.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ratoon.compression import zstd
from ratoon.engine.sources.disk import too_large
from ratoon.engine.sources.merge import Tree
from ratoon.engine.sources.tar_stream import Inode, Stretch, members
from ratoon.errors import Corrupt, InvalidInput
from ratoon.machine.guest.shared.tar import TarError

CHUNK = 1024 * 1024
#: Bytes of all layers together, for each byte of the disk. What is hidden later needs no room
#: there, but time.
_MOST = 4

_Open = Callable[[BinaryIO], AbstractContextManager[Any]]


def _as_it_is(file: BinaryIO) -> AbstractContextManager[Any]:
    return file


_OPENERS: dict[bytes, _Open] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x5d\0\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": zstd.ZstdFile,
}


class Layers:
    """Those of one image, the lowest first; each is added with the file that it is in.

    InvalidInput, of all methods: it is too large for the disk, or holds what is no image's.
    Corrupt: what it is compressed with cannot be undone.
    """

    def __init__(self, name: str, disk_bytes: int) -> None:
        self.tree = Tree()
        self._name = name
        self._disk_bytes = disk_bytes
        self._left = _MOST * disk_bytes
        self._read: list[tuple[Path, str, list[tuple[Inode, Sequence[Stretch]]]]] = []

    def add(self, path: Path, label: str, *, whiteouts: bool) -> str:
        """Put a layer on the tree; the SHA-256, hex, of it without its compression.

        `label` names it in errors; `whiteouts`: see `Tree.add`.
        """
        found: list[tuple[Inode, Sequence[Stretch]]] = []
        self.tree.begin_layer()
        digest = hashlib.sha256()
        with self._opened(path, label, digest) as stream:
            for member in members(stream):
                if member.inode.size > self._disk_bytes:
                    raise too_large(self._name, self._disk_bytes)
                self.tree.add(member, whiteouts=whiteouts)
                if member.inode.size:
                    found.append((member.inode, member.stretches))
            while stream.read(CHUNK):
                pass
            self._left -= stream.position
        self._read.append((path, label, found))
        return digest.hexdigest()

    def contents(self, wanted: Container[Inode]) -> Iterator[tuple[Inode, Iterator[bytes]]]:
        """The content of those files, each to be read to its end before the next."""
        for path, label, found in self._read:
            left = [each for each in found if each[0] in wanted]
            if left:
                with self._opened(path, label) as stream:
                    for inode, stretches in left:
                        yield inode, _content(stream, inode.size, stretches)

    @contextmanager
    def _opened(self, path: Path, label: str, digest: Any = None) -> Iterator[_Stream]:
        try:
            with path.open("rb") as file:
                magic = file.read(8)
                file.seek(0)
                opener = next((_OPENERS[each] for each in _OPENERS if magic.startswith(each)), None)
                with (opener or _as_it_is)(file) as plain:
                    yield _Stream(
                        plain, digest, self._left, too_large(self._name, self._disk_bytes)
                    )
        except TarError as error:
            raise InvalidInput(
                f"image {self._name}: {label} is no tar archive that can be unpacked: {error}"
            ) from None
        except (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise Corrupt(f"image {self._name}: {label} cannot be unpacked: {error}") from None


class _Stream:
    """See `tar_stream.Stream`. `digest` is of all that was read; `end` is raised after `most`."""

    def __init__(self, plain: BinaryIO, digest: Any, most: int, end: InvalidInput) -> None:
        self.position = 0
        self._digest = digest
        self._plain = plain
        self._most = most
        self._end = end

    def read(self, size: int) -> bytes:
        data = self._plain.read(size)
        self.position += len(data)
        if self.position > self._most:
            raise self._end
        if self._digest is not None:
            self._digest.update(data)
        return data

    def skip(self, size: int) -> None:
        while size:
            data = self.read(min(size, CHUNK))
            if not data:
                raise TarError("it ends too early")
            size -= len(data)


def _content(stream: _Stream, size: int, stretches: Sequence[Stretch]) -> Iterator[bytes]:
    """What a file holds, its holes too."""
    end = 0
    for position, offset, length in stretches:
        yield from _zeros(offset - end)
        stream.skip(position - stream.position)
        while stream.position < position + length:
            data = stream.read(min(position + length - stream.position, CHUNK))
            if not data:
                raise TarError("it ends too early")
            yield data
        end = offset + length
    yield from _zeros(size - end)


def _zeros(size: int) -> Iterator[bytes]:
    nothing = bytes(min(size, CHUNK))
    while size > 0:
        yield nothing[:size]
        size -= CHUNK
