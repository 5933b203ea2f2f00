"""The tar format as images have it: read from whoever wrote it, and written for mke2fs.

Read: ustar, pax, GNU's and the oldest format; all else is a TarError. No header is believed before
it was checked, and none is held that is longer than MAX_ABOUT. Python's `tarfile` does neither: it
reads pax headers of any length, and takes damage for the end. Names are bytes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ratoon.machine.guest.shared import tar
from ratoon.machine.guest.shared.tar import BLOCK, TarError, padding

FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCKS, DIRECTORY, FIFO = (b"%d" % n for n in range(7))
#: All that Linux has, but for sockets, which tar cannot say.
KINDS = frozenset((FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCKS, DIRECTORY, FIFO))
_OLD_FILE, _CONTIGUOUS, _SPARSE = b"\0", b"7", b"S"
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_TARGET = b"x", b"g", b"L", b"K"
_ABOUT = frozenset((_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_TARGET))
#: Bytes of a header about the next entry: as many as Go's archive/tar reads, and so Docker.
MAX_ABOUT = 1024 * 1024
#: Headers about one entry: more have nothing to say, and there would be no end to them.
_MAX_ABOUT = 8
#: Stretches of a sparse file.
_MAX_STRETCHES = 100_000
_MAX_ID = 2**32 - 2
#: Seconds that an inode of ext4 can have.
_TIMES = (-(2**31), 2**34 - 2**31 - 1)
#: What Linux knows of attributes, by names that are nothing but text.
_ATTRIBUTE = re.compile(rb"(?:(?:user|trusted|security)\.|system\.posix_acl_(?:access|default)$)")
_PLAIN_NAME = re.compile(rb"[ !#-\[\]-~]{1,255}")
#: What pax has for the map of a sparse file: all pairs at once, or each number for itself.
_MAP = frozenset((b"GNU.sparse.map", b"GNU.sparse.offset", b"GNU.sparse.numbytes"))
_XATTR = b"SCHILY.xattr."
_ACLS = {
    b"SCHILY.acl.access": b"system.posix_acl_access",
    b"SCHILY.acl.default": b"system.posix_acl_default",
}
#: linux/posix_acl_xattr.h: the version, then entries of a tag, permissions and an id.
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_VERSION = struct.pack("<I", 2)
_ACL_TAGS = {b"user": 1, b"group": 4, b"mask": 0x10, b"other": 0x20}
#: As GNU tar and others write them: with a name there may be a number after it.
_ACL_LINE = re.compile(
    rb"(?P<tag>user|group|mask|other):(?P<who>[^:]*):(?P<bits>[rwx-]{3})(?::(?P<id>\d+))?(?:\s*#.*)?"
)
_NO_ID = 2**32 - 1

#: Where something lies in the stream, where in the file it is, and its length.
Stretch = tuple[int, int, int]


@dataclass(slots=True, eq=False)
class Inode:
    """What is on a disk, by whatever names; sizes are in bytes.

    `target` is a SYMLINK's, `device` the major and minor number of a CHARACTER or BLOCKS, and
    `children` are a DIRECTORY's. `text` is the content of a FILE that is ours.
    """

    kind: bytes
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    attributes: dict[bytes, bytes] = field(default_factory=dict)
    children: dict[bytes, Inode] = field(default_factory=dict)
    text: bytes = b""


@dataclass(slots=True)
class Member:
    """An entry of an archive. `link`: the name that a HARD_LINK is another one for."""

    name: bytes
    inode: Inode
    link: bytes = b""
    stretches: Sequence[Stretch] = ()


class Stream(Protocol):
    """What archives are read from; `position` is how many bytes of it were."""

    position: int

    def read(self, size: int) -> bytes:
        """So many bytes; fewer at the end."""

    def skip(self, size: int) -> None:
        """Read what nobody wants. TarError: there is less."""


def members(stream: Stream) -> Iterator[Member]:
    """What an archive has, in its order; content is skipped once the next is asked for.

    TarError: there is none, or it has what it must not have, or it ends too early.
    """
    records: dict[bytes, bytes] = {}
    maps: list[bytes] = []
    about = count = 0
    while (block := stream.read(BLOCK)).strip(b"\0"):
        header = _Header(block)
        count += 1
        if header.kind in _ABOUT:
            about += 1
            if about > _MAX_ABOUT or not 0 <= header.size <= MAX_ABOUT:
                raise TarError("it has headers that are too long")
            content = stream.read(header.size + len(padding(header.size)))
            if len(content) < header.size:
                raise TarError("it ends too early")
            for key, value in _records(header.kind, content[: header.size]):
                if key in _MAP:
                    maps.append(value)
                else:
                    records[key] = value
            continue
        member = _member(header, records, maps, stream)
        stored = sum(length for _, _, length in member.stretches)
        yield member
        stream.skip(stored + len(padding(stored)))
        records, maps, about = {}, [], 0
    if about or len(block) % BLOCK or not (count or block):
        raise TarError("it ends too early")


class _Header:
    """The 512 bytes at the beginning of an entry, checked."""

    def __init__(self, block: bytes) -> None:
        if len(block) < BLOCK:
            raise TarError("it ends too early")
        before, after = block[:148], block[156:]
        if _field(block[148:156]) != sum(before) + sum(after) + 8 * ord(" "):
            raise TarError("a header is none of tar's")
        self.block = block
        self.kind = block[156:157]
        self.size = _field(block[124:136])

    @property
    def name(self) -> bytes:
        name = tar.text(self.block[:100])
        # GNU's own format has other things there.
        prefix = tar.text(self.block[345:500]) if self.block[257:263] == b"ustar\0" else b""
        return prefix + b"/" + name if prefix else name


def _member(
    header: _Header,
    records: dict[bytes, bytes],
    maps: list[bytes],
    stream: Stream,
) -> Member:
    block, kind = header.block, header.kind
    name = records.get(b"GNU.sparse.name", records.get(b"path", header.name))
    stored = tar.number(records[b"size"]) if b"size" in records else header.size
    if kind in (_OLD_FILE, _CONTIGUOUS, _SPARSE):
        kind = FILE
    if kind == FILE and name.endswith(b"/") and not stored:
        kind = DIRECTORY  # as it was said before there was a type for them
    if kind not in KINDS:
        raise TarError(f"{shown(name)} is of the type {shown(kind)}")
    inode = Inode(
        kind,
        mode=_field(block[100:108]) & 0o7777,
        uid=tar.number(records[b"uid"]) if b"uid" in records else _field(block[108:116]),
        gid=tar.number(records[b"gid"]) if b"gid" in records else _field(block[116:124]),
        mtime_ns=_clamped(
            tar.nanoseconds(records[b"mtime"])
            if b"mtime" in records
            else _field(block[136:148]) * 10**9
        ),
        attributes=_attributes(records),
    )
    target = records.get(b"linkpath", tar.text(block[157:257]))
    if not (0 <= inode.uid <= _MAX_ID and 0 <= inode.gid <= _MAX_ID and stored >= 0):
        raise TarError(f"{shown(name)} has an owner or a size that Linux has not")
    stretches: Sequence[Stretch] = ()
    if kind == FILE:
        inode.size, stretches = _content(header, records, maps, stored, stream)
    elif kind == SYMLINK:
        inode.target = target
    elif kind in (CHARACTER, BLOCKS):
        inode.device = _field(block[329:337]), _field(block[337:345])
        if not (0 <= inode.device[0] < 1 << 12 and 0 <= inode.device[1] < 1 << 20):
            raise TarError(f"{shown(name)} is a device that Linux has not")
    if (kind == SYMLINK and not target) or b"\0" in name + target:
        raise TarError(f"{shown(name)} is not what Linux can have")
    return Member(name, inode, target if kind == HARD_LINK else b"", stretches)


# Content ------------------------------------------------------------------------------------------


def _content(
    header: _Header,
    records: dict[bytes, bytes],
    maps: list[bytes],
    stored: int,
    stream: Stream,
) -> tuple[int, Sequence[Stretch]]:
    """A file's size, and what of it is there: GNU tar has four ways to say that it has holes."""
    if header.kind == _SPARSE:
        size, pairs = _field(header.block[483:495]), _old_map(header.block, stream)
    elif b"GNU.sparse.major" in records:
        size = tar.number(records.get(b"GNU.sparse.realsize", b""))
        begin = stream.position
        pairs = _map_in_content(stream, stored)
        stored -= stream.position - begin
    elif b"GNU.sparse.size" in records:
        size = tar.number(records[b"GNU.sparse.size"])
        numbers = b",".join(maps).split(b",")
        pairs = _pairs([tar.number(number) for number in numbers if number])
    else:
        return stored, ((stream.position, 0, stored),) if stored else ()
    at, end, stretches = stream.position, 0, []
    for offset, length in pairs:
        if offset < end or length < 0 or offset + length > size:
            raise TarError("a sparse file contradicts itself")
        end = offset + length
        if length:
            stretches.append((at, offset, length))
        at += length
    if at - stream.position != stored or size < 0:
        raise TarError("a sparse file contradicts itself")
    return size, stretches


def _old_map(block: bytes, stream: Stream) -> list[tuple[int, int]]:
    """Of GNU's format: in the header, and in blocks after it as long as a flag says so."""
    fields, more = block[386:482], block[482]
    pairs: list[tuple[int, int]] = []
    while True:
        for at in range(0, len(fields) // 24 * 24, 24):
            if not fields[at : at + 24].strip(b"\0"):
                break
            pairs.append((_field(fields[at : at + 12]), _field(fields[at + 12 : at + 24])))
        if not more:
            return pairs
        fields = stream.read(BLOCK)
        if len(fields) < BLOCK or len(pairs) > _MAX_STRETCHES:
            raise TarError("a sparse file's map has no end")
        more = fields[504]


def _map_in_content(stream: Stream, stored: int) -> list[tuple[int, int]]:
    """Of pax, version 1.0: decimal numbers, a line for each, first how many pairs there are."""
    lines: list[bytes] = []
    rest, wanted = b"", 1
    while len(lines) < wanted:
        block = stream.read(BLOCK)
        stored -= BLOCK
        *more, rest = (rest + block).split(b"\n")
        lines += more
        if lines:
            wanted = 1 + 2 * tar.number(lines[0])
        if stored < 0 or len(rest) > BLOCK or wanted > 2 * _MAX_STRETCHES:
            raise TarError("a sparse file's map has no end")
    return _pairs([tar.number(line) for line in lines[1:wanted]])


def _pairs(numbers: list[int]) -> list[tuple[int, int]]:
    if len(numbers) % 2 or len(numbers) > 2 * _MAX_STRETCHES:
        raise TarError("a sparse file's map is none")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


# Records ------------------------------------------------------------------------------------------


def _records(about: bytes, content: bytes) -> list[tuple[bytes, bytes]]:
    if about == _PAX_GLOBAL:
        return []  # notes, such as the commit that `git archive` was given
    if about != _PAX:
        return [(b"path" if about == _GNU_NAME else b"linkpath", tar.text(content))]
    found, at = [], 0
    while at < len(content):
        space = content.find(b" ", at, at + 20)
        end = at + tar.number(content[at : max(space, at)])
        key, separator, value = content[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(content) or not separator or content[end - 1 : end] != b"\n":
            raise TarError("a pax record is none")
        found.append((key, value))
        at = end
    return found


def _attributes(records: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """The extended attributes of a file; those of other systems are left out."""
    found = {}
    for key, value in records.items():
        if key in _ACLS and value:
            found[_ACLS[key]] = _acl(value)
        elif key.startswith(_XATTR) and is_attribute(key.removeprefix(_XATTR)):
            found[key.removeprefix(_XATTR)] = value
    return found


def is_attribute(name: bytes) -> bool:
    """Whether Linux has extended attributes of that name. TarError: it has, but ours are text."""
    if not _ATTRIBUTE.match(name):
        return False
    if not _PLAIN_NAME.fullmatch(name):
        raise TarError(f"{shown(name)} is no name for an attribute")
    return True


def _acl(text: bytes) -> bytes:
    """An access control list as the kernel has it. Names are the image's: nobodycan say who."""
    entries = []
    for line in re.split(rb"[,\n]", text.strip(b",\n")):
        match = _ACL_LINE.fullmatch(line)
        if match is None:
            raise TarError(f"an access control list has {shown(line)}")
        tag = _ACL_TAGS[match["tag"]] * (2 if match["who"] else 1)
        digits = match["who"] if match["who"].isdigit() else match["id"] or b""
        number = tar.number(digits) if match["who"] else _NO_ID
        bits = sum(4 >> place for place, letter in enumerate(b"rwx") if letter in match["bits"])
        entries.append((tag, min(number, _NO_ID), bits))
    packed = (_ACL_ENTRY.pack(tag, bits, number) for tag, number, bits in sorted(entries))
    return _ACL_VERSION + b"".join(packed)


def _field(data: bytes) -> int:
    """A number of a header: octal, or as GNU has large and negative ones."""
    if data[0] & 0x80:
        first = data[0] | 0x80 if data[0] & 0x40 else data[0] & 0x7F
        return int.from_bytes(bytes([first]) + data[1:], signed=True)
    digits = data.strip(b" \0") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise TarError(f"{shown(data)} is no number")
    return int(digits, 8)


def _clamped(ns: int) -> int:
    least, most = _TIMES
    return min(max(ns, least * 10**9), most * 10**9)


def shown(data: bytes) -> str:
    """Bytes of a stranger's, for an error."""
    return repr(data[:200])[1:]


# Written for mke2fs -------------------------------------------------------------------------------


#: The one attribute that mke2fs takes from a tar.
CAPABILITY = b"security.capability"


def header(path: bytes, inode: Inode, link: bytes = b"") -> bytes:
    """The headers of an entry as libarchive takes them, whatever the locale; `link`: see Member.

    Times are whole seconds, and of attributes there is the one that mke2fs takes.
    """
    seconds = b"%d" % (inode.mtime_ns // 10**9)
    target = link or inode.target
    records = {
        b"hdrcharset": b"BINARY",
        b"path": path,
        **({b"linkpath": target} if target else {}),
        b"size": b"%d" % (0 if link else inode.size),
        b"uid": b"%d" % inode.uid,
        b"gid": b"%d" % inode.gid,
        **dict.fromkeys((b"mtime", b"atime", b"ctime"), seconds),
    }
    if CAPABILITY in inode.attributes and not link:
        records[_XATTR + CAPABILITY] = inode.attributes[CAPABILITY]
    pax = b"".join(map(tar.record, records, records.values()))
    kind = HARD_LINK if link else inode.kind
    # That there is a target must be in the header, or the record is not looked at.
    own = _ustar(kind, mode=inode.mode, target=target[:100], device=inode.device)
    return _ustar(_PAX, size=len(pax)) + pax + padding(len(pax)) + own


def _ustar(
    kind: bytes,
    *,
    mode: int = 0,
    target: bytes = b"",
    device: tuple[int, int] = (0, 0),
    size: int = 0,
) -> bytes:
    """A header, in which is what libarchive takes from nowhere else."""
    before = b"entry".ljust(100, b"\0") + b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (
        mode,
        0,
        0,
        size,
        0,
    )
    devices = b"%07o\0%07o\0" % device
    after = kind + target.ljust(100, b"\0") + b"ustar\x0000" + bytes(64) + devices + bytes(167)
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return b"%b%06o\0 %b" % (before, checksum, after)
