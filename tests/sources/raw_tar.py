"""Tar headers by hand, as right or as wrong as a test wants them."""

from __future__ import annotations

BLOCK = 512
END = bytes(2 * BLOCK)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def header(
    name: bytes,
    kind: bytes = b"0",
    size: int | bytes = 0,
    *,
    mode: bytes = b"0000644\0",
    uid: int | bytes = 0,
    mtime: int | bytes = 0,
    target: bytes = b"",
    magic: bytes = b"ustar\x0000",
    rest: bytes = b"",
) -> bytes:
    """512 bytes; numbers may be given as bytes, and `rest` is what comes after the magic."""
    own = uid if isinstance(uid, bytes) else b"%07o\0" % uid
    sizes = [each if isinstance(each, bytes) else b"%011o\0" % each for each in (size, mtime)]
    before = name.ljust(100, b"\0") + mode + own + own + b"".join(sizes)
    after = kind + target.ljust(100, b"\0") + magic + rest.ljust(247, b"\0")
    return before + b"%06o\0 " % (sum(before) + sum(after) + 256) + after


def member(name: bytes, data: bytes = b"", kind: bytes = b"0", **more: int | bytes) -> bytes:
    return header(name, kind, len(data), **more) + padded(data)  # type: ignore[arg-type]


def record(key: bytes, value: bytes) -> bytes:
    size = len(key) + len(value) + 3
    while len(b"%d %b=%b\n" % (size, key, value)) != size:
        size += 1
    return b"%d %b=%b\n" % (size, key, value)


def pax(records: dict[bytes, bytes] | bytes) -> bytes:
    if isinstance(records, dict):
        records = b"".join(record(key, value) for key, value in records.items())
    return member(b"pax", records, b"x")


def large(number: int, length: int = 12) -> bytes:
    """As GNU tar writes numbers that octal digits have no room for."""
    raw = bytearray(number.to_bytes(length, "big", signed=True))
    raw[0] |= 0x80
    return bytes(raw)
