"""Reading ext4 from a file: inodes, directories and file content, in user space and read-only.

A sandbox's file system is what a stranger wrote. To mount it would hand it to the host's kernel as
root; this reader needs no privileges, checks every number it follows, and reads no more blocks
than the file system has. See `needs_recovery` for its journal.

The format: https://docs.kernel.org/filesystems/ext4/
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ratoon.errors import UnreadableDisk

ROOT = 2

_MAGIC = 0xEF53
_NEEDS_RECOVERY, _64BIT = 0x4, 0x80
#: filetype, recovery, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir
_KNOWN = 0x2 | _NEEDS_RECOVERY | 0x40 | _64BIT | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000
_EXTENTS, _UNREADABLE = 0x80000, 0x800 | 0x10000000  # encrypted, inline data
_EXTENT_MAGIC = 0xF30A
_MAX_EXTENT_DEPTH = 5
_MAX_WRITTEN = 32768  # a longer extent is one that was never written
_FAST_LINK = 60
_CHUNK = 1 << 20
_GRAIN = 1024  # the smallest block: so the digest does not depend on the block size


@dataclass(frozen=True)
class Inode:
    """A file of any type. `size` is in bytes; `device` is that of a device node."""

    number: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    ctime_ns: int
    flags: int
    block: bytes

    @property
    def device(self) -> bytes:
        return self.block[:8] if stat.S_ISBLK(self.mode) or stat.S_ISCHR(self.mode) else b""


class Ext4:
    """The file system in the file `path`; `label` names it in errors. Leaving `with` closes it.

    Making one and all its methods raise UnreadableDisk: there is no ext4 file system, or one that
    contradicts itself, or with features that are not known here.
    """

    def __init__(self, path: Path, label: str) -> None:
        self._label = label
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._read_superblock()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Ext4:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def _read_superblock(self) -> None:
        raw = os.pread(self._fd, 1024, 1024)
        if len(raw) < 1024 or _u16(raw, 0x38) != _MAGIC:
            raise UnreadableDisk(f"{self._label} holds no ext4 file system")
        features = _u32(raw, 0x60)
        #: Whether its journal must be replayed before anything else is read.
        self.needs_recovery = bool(features & _NEEDS_RECOVERY)
        if unknown := features & ~_KNOWN:
            raise UnreadableDisk(
                f"{self._label}: ext4 with features that are not known: {unknown:#x}"
            )
        wide = bool(features & _64BIT)
        self._inode_count = _u32(raw, 0x0)
        self.blocks = _u32(raw, 0x4) | (_u32(raw, 0x150) << 32 if wide else 0)
        if _u32(raw, 0x18) > 6:
            raise self.corrupt("blocks of an impossible size")
        #: Bytes in a block.
        self.block_size = 1024 << _u32(raw, 0x18)
        self._inodes_per_group = _u32(raw, 0x28)
        self._inode_size = _u16(raw, 0x58) if _u32(raw, 0x4C) else 128
        self._descriptor_size = _u16(raw, 0xFE) if wide else 32
        # In the block after the superblock's, which begins at byte 1024 whatever a block is.
        self._descriptors = (1024 // self.block_size + 1) * self.block_size
        if (
            self.blocks * self.block_size > os.fstat(self._fd).st_size
            or not self._inodes_per_group
            or not 128 <= self._inode_size <= self.block_size
            or not 32 <= self._descriptor_size <= self.block_size
        ):
            raise self.corrupt("impossible sizes in the superblock")

    def inode(self, number: int) -> Inode:
        """The inode `number`."""
        if not 1 <= number <= self._inode_count:
            raise self.corrupt(f"inode {number} of {self._inode_count}")
        group, position = divmod(number - 1, self._inodes_per_group)
        where = self._descriptors + group * self._descriptor_size
        descriptor = self._pread(self._descriptor_size, where)
        table = _u32(descriptor, 0x8)
        if self._descriptor_size >= 64:
            table |= _u32(descriptor, 0x28) << 32
        at = table * self.block_size + position * self._inode_size
        raw = self._pread(self._inode_size, at)
        extra = 128 + _u16(raw, 0x80) if self._inode_size > 128 else 128
        mode = _u16(raw, 0x0)
        long = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        return Inode(
            number=number,
            mode=mode,
            uid=_u16(raw, 0x2) | _u16(raw, 0x78) << 16,
            gid=_u16(raw, 0x18) | _u16(raw, 0x7A) << 16,
            size=_u32(raw, 0x4) | (_u32(raw, 0x6C) << 32 if long else 0),
            mtime_ns=_time(raw, 0x10, 0x88, extra),
            ctime_ns=_time(raw, 0xC, 0x84, extra),
            flags=_u32(raw, 0x20),
            block=raw[0x28:0x64],
        )

    def entries(self, directory: Inode) -> Iterator[tuple[bytes, int]]:
        """The names in a directory, `.` and `..` left out, and their inodes' numbers."""
        blocks = -(-directory.size // self.block_size)
        for logical, physical, count in self._mapped(directory):
            for block in range(physical, physical + min(count, blocks - logical)):
                yield from self._entries_in(self._block(block), directory.number)

    def _entries_in(self, raw: bytes, directory: int) -> Iterator[tuple[bytes, int]]:
        # Nodes of a directory's hash tree look like unused entries that fill their block.
        at = 0
        while at < len(raw):
            number, length, name_length = _u32(raw, at), _u16(raw, at + 4), raw[at + 6]
            if length in (0, 65535):  # what a block of 64 KiB has for its own length
                length = len(raw)
            if length < 8 + name_length or length % 4 or at + length > len(raw):
                raise self.corrupt(f"the directory of inode {directory}")
            name = raw[at + 8 : at + 8 + name_length]
            if number and name not in (b".", b".."):
                if not name or b"/" in name or b"\0" in name:
                    raise self.corrupt(f"a name in the directory of inode {directory}")
                yield name, number
            at += length

    def link_target(self, link: Inode) -> bytes:
        """What a symbolic link points to."""
        if link.size < _FAST_LINK and not link.flags & _EXTENTS:
            return link.block[: link.size]
        if link.size > self.block_size:
            raise self.corrupt(f"the link of inode {link.number} is {link.size} bytes long")
        return b"".join(
            self._block(block)
            for _, physical, count in self._mapped(link)
            for block in range(physical, physical + count)
        )[: link.size]

    def content_digest(self, file: Inode) -> bytes:
        """Equal for two files of equal size if their content is equal; holes are zeros."""
        digest = blake3()
        for logical, physical, count in self._mapped(file):
            start, end = logical * self.block_size, (logical + count) * self.block_size
            for at in range(start, min(end, file.size), _CHUNK):
                length = min(_CHUNK, end - at, file.size - at)
                raw = self._pread(length, physical * self.block_size + at - start)
                for first in range(0, length, _GRAIN):
                    grain = raw[first : first + _GRAIN]
                    if grain.strip(b"\0"):
                        digest.update((at + first).to_bytes(8))
                        digest.update(grain)
        return digest.digest()

    def _mapped(self, inode: Inode) -> Iterator[tuple[int, int, int]]:
        """First logical block, first physical block and count of each written stretch, in order."""
        if inode.flags & _UNREADABLE:
            raise UnreadableDisk(
                f"{self._label}: inode {inode.number} is encrypted or has inline data"
            )
        nodes: set[int] = set()
        if inode.flags & _EXTENTS:
            stretches = self._extents(inode.block, inode.number, _MAX_EXTENT_DEPTH + 1, nodes)
        else:
            stretches = self._indirect(inode.block, inode.number, nodes)
        end = total = 0
        for logical, physical, count in stretches:
            total += count
            if logical < end or total > self.blocks or physical + count > self.blocks:
                raise self.corrupt(f"the block map of inode {inode.number}")
            end = logical + count
            yield logical, physical, count

    def _extents(
        self, node: bytes, number: int, above: int, nodes: set[int]
    ) -> Iterator[tuple[int, int, int]]:
        magic, entries, _, depth = struct.unpack_from("<4H", node)
        if magic != _EXTENT_MAGIC or depth >= above or 12 + 12 * entries > len(node):
            raise self.corrupt(f"the extents of inode {number}")
        for at in range(12, 12 + 12 * entries, 12):
            if depth:
                _, low, high = struct.unpack_from("<IIH", node, at)
                below = self._node(low | high << 32, number, nodes)
                yield from self._extents(below, number, depth, nodes)
            else:
                logical, count, high, low = struct.unpack_from("<IHHI", node, at)
                if count <= _MAX_WRITTEN:
                    yield logical, low | high << 32, count

    def _indirect(
        self, block: bytes, number: int, nodes: set[int]
    ) -> Iterator[tuple[int, int, int]]:
        """The older way: 12 blocks, then trees of 1, 2 and 3 levels. Holes are zeros."""
        pointers = struct.unpack("<15I", block)
        logical = 0
        for pointer, depth in zip(pointers, (*[0] * 12, 1, 2, 3), strict=True):
            yield from self._indirect_below(pointer, depth, logical, number, nodes)
            logical += (self.block_size // 4) ** depth

    def _indirect_below(
        self, pointer: int, depth: int, logical: int, number: int, nodes: set[int]
    ) -> Iterator[tuple[int, int, int]]:
        if not pointer:
            return
        if not depth:
            yield logical, pointer, 1
            return
        for (below,) in struct.iter_unpack("<I", self._node(pointer, number, nodes)):
            yield from self._indirect_below(below, depth - 1, logical, number, nodes)
            logical += (self.block_size // 4) ** (depth - 1)

    def _node(self, block: int, number: int, nodes: set[int]) -> bytes:
        """A block of a block map; it is met once, or following the map might never end."""
        if block in nodes:
            raise self.corrupt(f"the block map of inode {number}")
        nodes.add(block)
        return self._block(block)

    def _block(self, number: int) -> bytes:
        return self._pread(self.block_size, number * self.block_size)

    def _pread(self, length: int, offset: int) -> bytes:
        if offset >= 1 << 63:
            raise self.corrupt(f"a block at byte {offset}")
        raw = os.pread(self._fd, length, offset)
        if len(raw) != length:
            raise self.corrupt(f"a block at byte {offset}, beyond the end")
        return raw

    def corrupt(self, what: str) -> UnreadableDisk:
        """The error for a file system that contradicts itself in `what`."""
        return UnreadableDisk(f"{self._label}: damaged ext4 file system: {what}")


def _u16(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 2], "little")


def _u32(raw: bytes, at: int) -> int:
    return int.from_bytes(raw[at : at + 4], "little")


def _time(raw: bytes, at: int, extra_at: int, end: int) -> int:
    """Nanoseconds since 1970; two bits of the second field carry the seconds beyond 2038."""
    seconds = int.from_bytes(raw[at : at + 4], "little", signed=True)
    if extra_at + 4 > end:
        return seconds * 10**9
    extra = _u32(raw, extra_at)
    return (seconds + ((extra & 3) << 32)) * 10**9 + (extra >> 2)
