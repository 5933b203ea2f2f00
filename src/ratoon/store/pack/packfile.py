"""The pack: a snapshot with its whole chain in one file, `.tar.zst`. Format version 1.

One zstd frame with a checksum and a window of at most 8 MiB, around a tar stream::

    pack.json            format, tag, and every file below with its size and BLAKE3 digest
    pack.sig             optional and empty: the place for a signature of pack.json
    manifest.json        the snapshot's manifest, and its digest
    manifest.b3
    vmstate              its device state
    ancestry/0/memory.bin, ancestry/0/disk.qcow2, …     the layers, base first
    memory.bin, disk.qcow2                              its own

So `tar -x` gives a snapshot directory. But a pack is not just any archive: names and order are
these, and `pack.json` gives the sizes, so all tar headers are known before they are read. The
reader compares them byte by byte, and what is not there cannot be misunderstood: links, devices,
other names, other owners, a second file of a name. Equal snapshots give equal bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import zip_longest
from typing import Annotated, BinaryIO, Final, Literal

from pydantic import Field, ValidationError
from pydantic_core import from_json

from ratoon.compression import LEVEL, WINDOW_LOG, zstd
from ratoon.documents import Document
from ratoon.errors import Corrupt, Incompatible
from ratoon.store.snapshot.manifest import Count, Digest, Tag
from ratoon.store.snapshot.snapshot import (
    ANCESTRY,
    DISK,
    MANIFEST,
    MANIFEST_DIGEST,
    MEMORY,
    VMSTATE,
)
from ratoon.validation import first_error

FORMAT: Final = 1
CONTENTS: Final = "pack.json"
SIGNATURE: Final = "pack.sig"

#: `pack.json` and `manifest.json` are read into memory, so they have limits: some 1000 layers,
#: which is about as many files as a machine can open.
MAX_CONTENTS = 384 << 10
MAX_MANIFEST = 1 << 20
#: Bytes that are read, written and hashed at a time.
CHUNK = 128 * 1024

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_SIZE = slice(124, 136)
_CHECKSUM = slice(148, 156)
_MAX_OCTAL = 8**11 - 1


class PackedFile(Document):
    """A file in the pack: `size` in bytes, `digest` the BLAKE3 of all of it."""

    name: Annotated[str, Field(max_length=64)]
    size: Count
    digest: Digest


class Contents(Document):
    """What `pack.json` says: the head's tag, and the files in the order in which they follow."""

    format: Literal[1] = FORMAT
    tag: Tag
    files: Annotated[tuple[PackedFile, ...], Field(min_length=5, fail_fast=True)]


def layer_names(depth: int) -> list[tuple[str, str]]:
    """The names of the memory and the disk file of each layer, base first."""
    below = [f"{ANCESTRY}/{layer}/" for layer in range(depth)]
    return [(directory + MEMORY, directory + DISK) for directory in (*below, "")]


def file_names(depth: int) -> list[str]:
    """All files of a snapshot with `depth` layers below its own, in a pack's order."""
    layers = [name for layer in layer_names(depth) for name in layer]
    return [MANIFEST, MANIFEST_DIGEST, VMSTATE, *layers]


def tar_header(name: str, size: int) -> bytes:
    """The tar header of a regular file: 512 bytes that depend on nothing else.

    A size of 8 GiB or more is written in base 256, as GNU tar does.
    """
    octal = b"%011o\0" % size if size <= _MAX_OCTAL else b"\x80" + size.to_bytes(11, "big")
    header = bytearray(_BLOCK)
    header[: len(name)] = name.encode("ascii")
    header[100:124] = b"0000400\x000000000\x000000000\0"  # mode, user, group
    header[_SIZE] = octal
    header[136:148] = b"00000000000\0"  # the time
    header[_CHECKSUM] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[329:345] = b"0000000\x000000000\0"  # device numbers
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


class PackWriter:
    """Writes a pack's members into `file`. The caller keeps to the order, and to the sizes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        parameter = zstd.CompressionParameter
        self._zstd = zstd.ZstdCompressor(
            options={parameter.compression_level: LEVEL, parameter.checksum_flag: 1}
        )

    def contents(self, contents: Contents) -> None:
        """Write the first member. Incompatible: a chain so long that no reader would take it."""
        raw = contents.model_dump_json().encode() + b"\n"
        if len(raw) > MAX_CONTENTS or contents.files[0].size > MAX_MANIFEST:
            raise Incompatible(
                f"snapshot {contents.tag} has too many layers for a pack; compact it first"
            )
        self.begin(CONTENTS, len(raw))
        self.write(raw)
        self.end(len(raw))

    def begin(self, name: str, size: int) -> None:
        """Begin a member of `size` bytes; `write` them, then `end` it."""
        self.write(tar_header(name, size))

    def write(self, data: bytes) -> None:
        self._file.write(self._zstd.compress(data))

    def end(self, size: int) -> None:
        self.write(bytes(-size % _BLOCK))

    def finish(self) -> None:
        """Write the end of the archive."""
        self.write(_END)
        self._file.write(self._zstd.flush())


class PackReader:
    """Reads a pack member by member, from `file`; `label` names it in errors.

    Everything raises Corrupt where the pack is damaged, cut short or not a pack, and Incompatible
    where another version of Ratoon may know better. Holds a window and a chunk, whatever it reads.
    """

    def __init__(self, file: BinaryIO, label: str) -> None:
        self._file = file
        self._label = label
        self._zstd = zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
        )
        self._pending: bytes | None = None

    def contents(self) -> Contents:
        """Read the first member, and the empty signature if there is one."""
        header = self._read(_BLOCK)
        size = re.fullmatch(rb"([0-7]{11})\0", header[_SIZE])
        if not size or header != tar_header(CONTENTS, int(size[1], 8)):
            raise Corrupt(f"{self._label}: not a pack: it does not begin with {CONTENTS}")
        length = int(size[1], 8)
        if length > MAX_CONTENTS:
            raise Corrupt(f"{self._label}: {CONTENTS} has {length} bytes, more than it may")
        contents = _decode(b"".join(self._body(CONTENTS, length)), self._label)
        header = self._read(_BLOCK)
        if header == tar_header(SIGNATURE, 0):
            header = self._read(_BLOCK)
        elif header.startswith(SIGNATURE.encode() + b"\0"):
            raise Incompatible(
                f"{self._label}: it is signed in a way that this Ratoon cannot check; "
                "use the version that it was made with"
            )
        self._pending = header
        return contents

    def body(self, file: PackedFile) -> Iterator[bytes]:
        """The content of the next member, which must be `file`: chunk by chunk, not yet checked.

        To be read to its end. Chunks are full but the last, and none is empty.
        """
        header, self._pending = self._pending or self._read(_BLOCK), None
        if header != tar_header(file.name, file.size):
            raise Corrupt(
                f"{self._label}: {_describe(header)} where {file.name} must be, a regular file "
                f"of {file.size} bytes"
            )
        yield from self._body(file.name, file.size)

    def finish(self) -> None:
        """Read the end of the archive, after which there may be nothing."""
        header = self._pending or self._read(_BLOCK)
        if header + self._read(_BLOCK) != _END:
            raise Corrupt(f"{self._label}: {_describe(header)} after the last of its files")
        while not self._zstd.eof:
            if self._more(1):
                raise Corrupt(f"{self._label}: the archive goes on after its end")
        if self._zstd.unused_data or self._file.read(1):
            raise Corrupt(f"{self._label}: the file goes on after the end of the archive")

    def _body(self, name: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, CHUNK):
            yield self._read(min(CHUNK, size - start))
        if any(self._read(-size % _BLOCK)):
            raise Corrupt(f"{self._label}: something is hidden behind {name}")

    def _read(self, size: int) -> bytes:
        """Exactly `size` bytes of the tar stream."""
        parts = []
        while size:
            if self._zstd.eof:
                raise Corrupt(f"{self._label}: the archive ends in the middle")
            parts.append(self._more(size))
            size -= len(parts[-1])
        return b"".join(parts)

    def _more(self, limit: int) -> bytes:
        """At most `limit` bytes of the tar stream, or none, if it takes more input to give some."""
        raw = b""
        if self._zstd.needs_input and not (raw := self._file.read(CHUNK)):
            raise Corrupt(f"{self._label}: cut short: the file ends in the middle")
        try:
            return self._zstd.decompress(raw, limit)
        except zstd.ZstdError as error:
            raise Corrupt(f"{self._label}: damaged, or not a pack: {error}") from error


def _decode(raw: bytes, label: str) -> Contents:
    try:
        document = from_json(raw)
    except ValueError as error:
        raise Corrupt(f"{label}: {CONTENTS} is not JSON: {error}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if type(found) is not int:
        raise Corrupt(f"{label}: {CONTENTS} names no format")
    if found != FORMAT:
        raise Incompatible(
            f"{label}: pack format {found}, but this Ratoon reads format {FORMAT}; "
            "unpack it with the version that it was made with"
        )
    try:
        contents = Contents.model_validate_json(raw)
    except ValidationError as error:
        raise Corrupt(f"{label}: {CONTENTS}: {first_error(error)}") from error
    names = [file.name for file in contents.files]
    for name, expected in zip_longest(names, file_names((len(names) - 5) // 2)):
        if name != expected:
            raise Corrupt(f"{label}: {CONTENTS} lists {name!r} where {expected} must be")
    return contents


def _describe(header: bytes) -> str:
    """What a tar header that was not expected stands for."""
    if not any(header):
        return "the end of the archive"
    kinds = {
        b"1": "a link",
        b"2": "a link",
        b"3": "a device",
        b"4": "a device",
        b"5": "a directory",
    }
    name = header[:100].rstrip(b"\0").decode(errors="replace")
    return f"{kinds.get(header[156:157], 'a member')} {name!r}"
