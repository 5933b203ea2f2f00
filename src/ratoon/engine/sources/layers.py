"""Layers and tarballs as streams: read once for the tree that they make, and once for content.

So no layer is unpacked to anywhere, and none is held. What a layer is compressed with, its first
bytes tell: manifests may be wrong.
"""

from __future__ import annotations

import bz2
import hashlib
import lzma
import sys
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ratoon.compression import zstd
from ratoon.engine.sources.disk import Buffer, too_large
from ratoon.engine.sources.merge import Tree
from ratoon.engine.sources.tar_stream import Inode, Stretch, members
from ratoon.errors import Corrupt, InvalidInput
from ratoon.machine.guest.shared.tar import TarError

CHUNK = 1024 * 1024
#: Bytes of a compressed layer that are looked at together.
_INPUT = 64 * 1024
#: zlib's `windowBits` for gzip with any window.
_GZIP_ONLY = 31
#: Bytes that xz may take: as much as its highest level needs, four times.
_MEMORY = 256 * 1024 * 1024
#: Bytes of all layers together, for each byte of the disk. What is hidden later needs no room
#: there, but time.
_MOST = 4


class _Decompressor(Protocol):
    """Of gzip and the others; zlib's alone gives back what it has not looked at."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


_DECOMPRESSORS: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": lambda: zlib.decompressobj(_GZIP_ONLY),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lambda: lzma.LZMADecompressor(memlimit=_MEMORY),
    b"\x5d\0\0": lambda: lzma.LZMADecompressor(memlimit=_MEMORY),
    b"\x28\xb5\x2f\xfd": zstd.ZstdDecompressor,
}


class _Plain:
    """What is in a file, without its compression: one member or frame after another."""

    def __init__(self, file: BinaryIO) -> None:
        magic = file.read(8)
        file.seek(0)
        self._file = file
        self._new = next(
            (_DECOMPRESSORS[it] for it in _DECOMPRESSORS if magic.startswith(it)), None
        )
        self._member = self._new and self._new()
        self._data = b""

    def read(self, size: int) -> bytes:
        """Some bytes, `size` at most; none at the end. EOFError; others of the compression's."""
        if self._member is None or self._new is None:
            return self._file.read(size)
        while True:
            if self._member.eof:
                self._data = self._member.unused_data.lstrip(b"\0")
                while not self._data:  # zeros may follow
                    data = self._file.read(_INPUT)
                    if not data:
                        return b""
                    self._data = data.lstrip(b"\0")
                self._member = self._new()
            if not self._data and getattr(self._member, "needs_input", True):
                self._data = self._file.read(_INPUT)
                if not self._data:
                    raise EOFError("it ends too early")
            plain = self._member.decompress(self._data, size)
            self._data = getattr(self._member, "unconsumed_tail", b"")
            if plain:
                return plain


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
            for _ in stream.pieces(sys.maxsize):
                pass
            self._left -= stream.position
        self._read.append((path, label, found))
        return digest.hexdigest()

    def contents(self, wanted: Container[Inode]) -> Iterator[tuple[Inode, Iterator[Buffer]]]:
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
                end = too_large(self._name, self._disk_bytes)
                with ThreadPoolExecutor(1, "layer") as ahead:
                    yield _Stream(_Plain(file), ahead, digest, self._left, end)
        except TarError as error:
            raise InvalidInput(
                f"image {self._name}: {label} is no tar archive that can be unpacked: {error}"
            ) from None
        except (EOFError, OSError, zlib.error, lzma.LZMAError, zstd.ZstdError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise Corrupt(f"image {self._name}: {label} cannot be unpacked: {error}") from None


class _Stream:
    """See `tar_stream.Stream`. The next piece of it is read while one is looked at.

    `digest` is of all that was read; `end` is raised after `most`.
    """

    def __init__(
        self, plain: _Plain, ahead: Executor, digest: Any, most: int, end: InvalidInput
    ) -> None:
        self.position = 0
        self._plain = plain
        self._ahead = ahead
        self._digest = digest
        self._most = most
        self._end = end
        self._next = ahead.submit(plain.read, CHUNK)
        #: What was read of late, and how far that was given away.
        self._piece = b""
        self._at = 0

    def read(self, size: int) -> bytes:
        if self._at + size > len(self._piece):
            return b"".join(self.pieces(size))
        self._at += size
        self.position += size
        return self._piece[self._at - size : self._at]

    def skip(self, size: int) -> None:
        if sum(map(len, self.pieces(size))) < size:
            raise TarError("it ends too early")

    def pieces(self, size: int) -> Iterator[memoryview]:
        """So many bytes, as they come; fewer at the end."""
        while size and (self._at < len(self._piece) or self._advance()):
            piece = memoryview(self._piece)[self._at : self._at + size]
            self._at += len(piece)
            self.position += len(piece)
            size -= len(piece)
            yield piece

    def _advance(self) -> bool:
        """Whether there is another piece: it is the one now."""
        self._piece, self._at = self._next.result(), 0
        if not self._piece:
            return False
        self._next = self._ahead.submit(self._plain.read, CHUNK)
        self._most -= len(self._piece)
        if self._most < 0:
            raise self._end
        if self._digest is not None:
            self._digest.update(self._piece)
        return True


def _content(stream: _Stream, size: int, stretches: Sequence[Stretch]) -> Iterator[Buffer]:
    """What a file holds, its holes too."""
    end = 0
    for position, offset, length in stretches:
        yield from _zeros(offset - end)
        stream.skip(position - stream.position)
        yield from stream.pieces(length)
        if stream.position != position + length:
            raise TarError("it ends too early")
        end = offset + length
    yield from _zeros(size - end)


def _zeros(size: int) -> Iterator[bytes]:
    nothing = bytes(min(size, CHUNK))
    while size > 0:
        yield nothing[:size]
        size -= CHUNK
