"""XDR (RFC 4506): how RPC and NFS write numbers and bytes. What is read was written by a guest."""

from __future__ import annotations

import struct

_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")


class Garbage(Exception):
    """The bytes are not what they should be."""


class Reader:
    """Takes values off the front of a message; Garbage where it ends too soon."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at = 0

    def u32(self) -> int:
        return int(_U32.unpack(self.fixed(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.fixed(8))[0])

    def boolean(self) -> bool:
        value = self.u32()
        if value > 1:
            raise Garbage(f"{value} is no boolean")
        return bool(value)

    def fixed(self, length: int) -> memoryview:
        """That many bytes, which are padded to a multiple of 4."""
        end = self._at + length
        if end > len(self._data):
            raise Garbage("it ends too soon")
        found = self._data[self._at : end]
        self._at = end + (-length % 4)
        return found

    def opaque(self, most: int) -> memoryview:
        """Bytes after their length, at most `most`."""
        length = self.u32()
        if length > most:
            raise Garbage(f"{length} bytes where {most} are the most")
        return self.fixed(length)

    def rest(self) -> bytes:
        """All that was not read yet."""
        return bytes(self._data[self._at :])


class Writer:
    """Collects the values of a message."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.length = 0

    def raw(self, data: bytes) -> Writer:
        self._pieces.append(data)
        self.length += len(data)
        return self

    def u32(self, *values: int) -> Writer:
        return self.raw(struct.pack(f">{len(values)}I", *values))

    def u64(self, *values: int) -> Writer:
        return self.raw(struct.pack(f">{len(values)}Q", *values))

    def opaque(self, data: bytes) -> Writer:
        self.u32(len(data)).raw(data)
        return self.raw(bytes(-len(data) % 4)) if len(data) % 4 else self

    def done(self) -> bytes:
        return b"".join(self._pieces)
