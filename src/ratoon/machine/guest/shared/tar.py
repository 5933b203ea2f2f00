"""The tar format, as far as trees of files need it.

Written: POSIX ustar headers with a pax header before each, which has what ustar has no room for:
long names, times in nanoseconds, large sizes. Any tar reads that. Read: the same, and what the
usual programs write, GNU's long names included; all else is a TarError, because whoever reads may
not trust whoever wrote. Names are bytes, as Linux has them.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 512
FILE, HARD_LINK, SYMLINK, DIRECTORY = b"0", b"1", b"2", b"5"
KINDS = frozenset((FILE, HARD_LINK, SYMLINK, DIRECTORY))
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_TARGET = b"x", b"g", b"L", b"K"
#: Those whose content is about what comes after them.
_ABOUT = frozenset((_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_TARGET))
#: A name and a target of PATH_MAX bytes each, and small numbers.
MAX_PAX = 16 * 1024
#: Headers about one entry: more have nothing to say, and there would be no end to them.
_MAX_ABOUT = 3
#: What ustar's eleven octal digits hold, and its seven.
_LARGE, _SMALL = 8**11 - 1, 8**7 - 1
MAX_ID = 2**32 - 2
#: What GNU's own format has for magic and version.
_GNU = b"ustar  \0"
#: Zeros that may follow the end: programs pad to records of 10 KiB, or of what they were told.
_MAX_EMPTY_BLOCKS = 2048
#: Two empty blocks. Tars are padded to whole records of 20 blocks by tradition alone.
END = bytes(2 * BLOCK)


class TarError(Exception):
    """What arrived is not a tar of files, directories and links."""


class Entry:
    """One thing in an archive; a FILE is followed by `size` bytes of content."""

    __slots__ = ("gid", "kind", "mode", "mtime_ns", "name", "size", "target", "uid")

    def __init__(
        self,
        name: bytes,
        kind: bytes,
        *,
        size: int = 0,
        mode: int = 0,
        uid: int = 0,
        gid: int = 0,
        mtime_ns: int = 0,
        target: bytes = b"",
    ) -> None:
        self.name = name
        self.kind = kind
        self.size = size
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        #: Of a SYMLINK, what it says; of a HARD_LINK, the name of an earlier entry.
        self.target = target


def encode(entry: Entry) -> bytes:
    """The headers of `entry`; its content, padded by `padding`, comes next."""
    records = {b"path": entry.name, b"mtime": _decimal(entry.mtime_ns)}
    if entry.target:
        records[b"linkpath"] = entry.target
    for key, number, limit in (
        (b"size", entry.size, _LARGE),
        (b"uid", entry.uid, _SMALL),
        (b"gid", entry.gid, _SMALL),
    ):
        if number > limit:
            records[key] = b"%d" % number
    if not _is_utf8(entry.name + entry.target):
        records = {b"hdrcharset": b"BINARY", **records}
    pax = b"".join(record(key, value) for key, value in records.items())
    mtime = min(max(entry.mtime_ns // 10**9, 0), _LARGE)
    return b"".join(
        (
            _header(b"PaxHeader", _PAX, size=len(pax), mtime=mtime),
            pax,
            padding(len(pax)),
            _header(
                entry.name[:100],
                entry.kind,
                size=entry.size if entry.size <= _LARGE else 0,
                mode=entry.mode,
                uid=entry.uid if entry.uid <= _SMALL else 0,
                gid=entry.gid if entry.gid <= _SMALL else 0,
                mtime=mtime,
                target=entry.target[:100],
            ),
        )
    )


def padding(size: int) -> bytes:
    """What follows `size` bytes of content, up to a whole block."""
    return bytes(-size % BLOCK)


def _header(
    name: bytes,
    kind: bytes,
    *,
    size: int,
    mtime: int,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    target: bytes = b"",
) -> bytes:
    numbers = b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, uid, gid, size, mtime)
    before = name.ljust(100, b"\0") + numbers
    after = kind + target.ljust(100, b"\0") + b"ustar\x0000" + bytes(247)
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return b"%b%06o\0 %b" % (before, checksum, after)


def record(key: bytes, value: bytes) -> bytes:
    """A pax record. It begins with its own length, digits included."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %b=%b\n" % (length, key, value)


def _decimal(ns: int) -> bytes:
    return b"%b%d.%09d" % (b"-" if ns < 0 else b"", *divmod(abs(ns), 10**9))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class Reader:
    """Cuts a byte stream into entries and their content; holds a header at most."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._wanted = BLOCK
        #: What is known of the next entry beyond its header, by the names of pax records.
        self._records: dict[bytes, bytes] = {}
        #: The type of the header whose content is being gathered, one of _ABOUT.
        self._about = b""
        self._headers = 0
        self._content = 0
        self._padding = 0
        self._empty_blocks = 0

    @property
    def ended(self) -> bool:
        """Whether the archive's end has been read."""
        return self._empty_blocks >= 2

    def feed(self, data: bytes) -> Iterator[Entry | memoryview]:
        """What `data` continues, in order: each entry, and the pieces of a FILE's content after it.

        To be read to its end before the next piece is fed. Raises TarError.
        """
        view = memoryview(data)
        while view:
            if self._content:
                piece = view[: self._content]
                view = view[len(piece) :]
                self._content -= len(piece)
                yield piece
            elif self._padding:
                skipped = min(self._padding, len(view))
                view = view[skipped:]
                self._padding -= skipped
            else:
                piece = view[: self._wanted - len(self._header)]
                view = view[len(piece) :]
                self._header += piece
                if len(self._header) == self._wanted:
                    header = bytes(self._header)
                    self._header.clear()
                    entry = self._take(header)
                    if entry is not None:
                        yield entry

    def _take(self, header: bytes) -> Entry | None:
        if self._about:
            self._records |= _records(self._about, header)
            self._about = b""
            self._padding = -len(header) % BLOCK
            self._wanted = BLOCK
            return None
        if self._empty_blocks or not any(header):
            self._empty_blocks += 1
            if any(header) or self._records or self._empty_blocks > _MAX_EMPTY_BLOCKS:
                raise TarError("it goes on after its end")
            return None
        entry = _parse(header, self._records)
        if entry.kind in _ABOUT:
            self._headers += 1
            if self._headers > _MAX_ABOUT or not 0 < entry.size <= MAX_PAX:
                raise TarError(f"a header of {entry.size} bytes about the next entry")
            self._about = entry.kind
            self._wanted = entry.size
            return None
        self._headers = 0
        self._records = {}
        if entry.kind not in KINDS:
            raise TarError(f"an entry of type {entry.kind!r}")
        if entry.kind != FILE:
            entry.size = 0  # some programs give links the size of what they point at
        self._content = entry.size
        self._padding = -entry.size % BLOCK
        return entry


def _parse(header: bytes, records: dict[bytes, bytes]) -> Entry:
    """The entry that `header` describes, amended by its pax records."""
    magic = header[257:265]
    if not magic.startswith(b"ustar\0") and magic != _GNU:
        raise TarError("no ustar header")
    before, after = header[:148], header[156:]
    if _octal(header[148:156]) != sum(before) + sum(after) + 8 * ord(" "):
        raise TarError("a header whose checksum is wrong")
    prefix = text(header[345:500]) if magic != _GNU else b""  # something else is there
    name = text(header[:100])
    entry = Entry(
        prefix + b"/" + name if prefix else name,
        header[156:157],
        size=_octal(header[124:136]),
        mode=_octal(header[100:108]) & 0o7777,
        uid=_octal(header[108:116]),
        gid=_octal(header[116:124]),
        mtime_ns=_octal(header[136:148]) * 10**9,
        target=text(header[157:257]),
    )
    entry.name = records.get(b"path", entry.name)
    entry.target = records.get(b"linkpath", entry.target)
    if b"mtime" in records:
        entry.mtime_ns = nanoseconds(records[b"mtime"])
    if b"size" in records:
        entry.size = number(records[b"size"])
    if b"uid" in records:
        entry.uid = number(records[b"uid"])
    if b"gid" in records:
        entry.gid = number(records[b"gid"])
    if b"\0" in entry.name + entry.target or max(entry.uid, entry.gid) > MAX_ID:
        raise TarError("a name or an owner that Linux has not")
    return entry


def _records(about: bytes, pax: bytes) -> dict[bytes, bytes]:
    if about == _PAX_GLOBAL:
        return {}  # notes, such as the commit that `git archive` was given
    if about != _PAX:
        return {b"path" if about == _GNU_NAME else b"linkpath": text(pax)}
    found = {}
    while pax:
        digits, _, _ = pax.partition(b" ")
        length = number(digits)
        record = pax[len(digits) + 1 : length]
        key, separator, value = record[:-1].partition(b"=")
        if length > len(pax) or not separator or record[-1:] != b"\n":
            raise TarError("a pax record that is none")
        found[key] = value
        pax = pax[length:]
    return found


def text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise TarError(f"{field!r} is no octal number")
    return int(digits, 8)


def number(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise TarError(f"{digits[:40]!r} is no number of a file")
    return int(digits)


def nanoseconds(digits: bytes) -> int:
    """Of seconds with a fraction, as pax has them; what is finer than a nanosecond is cut off."""
    negative = digits.startswith(b"-")
    seconds, _, fraction = digits[negative:].partition(b".")
    ns = number(seconds) * 10**9 + number(fraction[:9].ljust(9, b"0"))
    return -ns if negative else ns
