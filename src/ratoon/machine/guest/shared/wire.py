"""The frames that host and guest exchange.

A frame is ``length u32 | stream u32 | kind u8 | payload``, big-endian. Streams are numbered by the
host and run side by side; every stream begins with a REQUEST and ends with a REPLY.

Bytes flow under credit, in each stream for itself: STDIN under STDIN_WINDOW, STDOUT and STDERR
together under OUTPUT_WINDOW. The receiver gives back what its reader has taken. So a reader that
does not read holds up its own stream alone, and neither side holds more than a window for it. An
empty STDOUT or STDERR says that no more of it comes, where somebody wants to know that early.

The channel is part of a snapshot, half a frame included, so whoever connects first sends MARKER and
a fresh 16-byte nonce. The agent forgets what it was reading and writing, answers MARKER and the
same nonce, and both begin at a frame's boundary again; the host discards all up to that answer.

MARKER cannot occur in a stream of frames: all its bytes are >= 0x80, while the first byte of a
header (lengths are small) and its last (kinds are small) are below, so it cannot touch a header;
and `encode` cuts a payload that contains it in two.
"""

from __future__ import annotations

import struct

#: The protocol's version: a host and an agent of different ones do not talk.
VERSION = 5

MARKER = bytes.fromhex("f1e2d3c4b5a697889f8e9dacbbcad9e8")
NONCE_BYTES = 16
SYNC_BYTES = len(MARKER) + NONCE_BYTES
#: What the relay of volumes has in a nonce's place: it asks the host to begin.
HELLO = bytes(NONCE_BYTES)
MAX_PAYLOAD = 64 * 1024

#: PART is the beginning of a message too large for one frame; a frame of its real kind ends it.
PART = 0
#: From the host. CANCEL: nobody wants the reply. OUTPUT_TAKEN: credit (u32). RESIZE: of a terminal,
#: rows and columns (u16 each). SIGNAL: a number (u8), for the stream's process group.
REQUEST, STDIN, STDIN_END, CANCEL, REBIRTH, OUTPUT_TAKEN, RESIZE, SIGNAL = range(1, 9)
#: From the guest. STDIN_TAKEN: credit (u32). STARTED: what was asked for has begun (JSON). COMMAND:
#: of no stream, and unasked: how the main command is (JSON).
REPLY, STDOUT, STDERR, STDIN_TAKEN, STARTED, COMMAND = range(16, 22)
KINDS = frozenset((PART, *range(REQUEST, SIGNAL + 1), *range(REPLY, COMMAND + 1)))
#: Those whose payload is a message, whole at the receiver; the others are pieces of a byte stream,
#: or small.
MESSAGES = frozenset((REQUEST, REPLY))
OUTPUTS = frozenset((STDOUT, STDERR))
MAX_MESSAGE = 4 * 1024 * 1024

#: Bytes that may be under way in one stream, each way.
STDIN_WINDOW = 256 * 1024
OUTPUT_WINDOW = 512 * 1024

CREDIT = struct.Struct(">I")
SIZE = struct.Struct(">HH")
HEADER = struct.Struct(">IIB")
#: REBIRTH's payload: which of those below, wall clock in ns, machine-id, entropy; the rest is the
#: instance's name, which becomes the hostname too. Packed, not JSON: it is on the path of every
#: fork, and under emulation each line of code that runs for the first time is paid for.
REBIRTH_FIELDS = struct.Struct(">Bq32s64s")
#: A new individual; the one that it was, which keeps its names; or as a new one, but without the
#: image's hooks and keys, only so that it has been done before. A rehearsal is a practice during
#: which the sandbox's processes go on standing still: another rebirth is to follow.
FORK, RESUME, PRACTICE, REHEARSAL = 1, 2, 3, 4
#: Together with one of them: its network policy leads out of the guest, to wherever that may be.
ONLINE = 0x80


class ProtocolError(Exception):
    """The peer sent what is no frame."""


def encode(stream: int, kind: int, payload: bytes = b"") -> bytes:
    """The frames that carry `payload`, of any length; at least one."""
    unfinished = PART if kind in MESSAGES else kind
    out = []
    start = 0
    while True:
        end = min(start + MAX_PAYLOAD, len(payload))
        marker = payload.find(MARKER, start, end)
        if marker >= 0:
            end = marker + 1
        out.append(HEADER.pack(end - start, stream, unfinished if end < len(payload) else kind))
        out.append(payload[start:end])
        start = end
        if start >= len(payload):
            return b"".join(out)


class Decoder:
    """Cuts a byte stream into frames and finds the MARKER.

    Holds at most a chunk, a frame, and the message under way.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        # The last bytes that were consumed as frames: a MARKER may begin in what a half frame ate.
        self._tail = b""
        self._awaiting_nonce = False
        # How much of the buffer has no MARKER in it: it fills page by page, and is not searched
        # again each time.
        self._searched = 0
        # A message whose end is still to come, and its stream; nothing comes between its frames.
        self._message = bytearray()
        self._message_stream = 0

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def only_frame(self, data: bytes) -> tuple[int, int, bytes] | None:
        """The one frame that `data` is, where nothing waits; else None, and `data` is to be fed.

        The same as `feed`, `sync` and `frames` find in it, for a fraction of what they cost.
        """
        size = len(data) - HEADER.size
        if size < 0 or self._buffer or self._message or self._awaiting_nonce:
            return None
        length, stream, kind = HEADER.unpack_from(data)
        if length != size or kind == PART or kind not in KINDS or MARKER in self._tail + data:
            return None
        self._tail = (self._tail + data)[-(SYNC_BYTES - 1) :]
        return stream, kind, data[HEADER.size :]

    def sync(self) -> bytes | None:
        """Drop all up to the last MARKER and its nonce, and return the nonce; None without one."""
        if not self._awaiting_nonce:
            known = max(0, self._searched - len(MARKER) + 1)
            unknown = (b"" if known else self._tail) + self._buffer[known:]
            self._searched = len(self._buffer)
            if MARKER not in unknown:
                return None
        self._searched = 0
        window = self._tail + self._buffer
        at = window.rfind(MARKER)
        self._awaiting_nonce = at >= 0 and len(window) < at + SYNC_BYTES
        if self._awaiting_nonce:
            self._buffer, self._tail = bytearray(window[at:]), b""
        if at < 0 or self._awaiting_nonce:
            return None
        nonce = bytes(window[at + len(MARKER) : at + SYNC_BYTES])
        self._buffer = bytearray(window[at + SYNC_BYTES :])
        # Of an older, half MARKER the "nonce" may be the beginning of the one that counts.
        self._tail = nonce
        self._message.clear()
        return nonce

    def frames(self) -> list[tuple[int, int, bytes]]:
        """What has arrived whole, as (stream, kind, payload); call `sync` first."""
        out: list[tuple[int, int, bytes]] = []
        if self._awaiting_nonce:
            return out
        buffer = self._buffer
        at = 0
        while len(buffer) - at >= HEADER.size:
            length, stream, kind = HEADER.unpack_from(buffer, at)
            if length > MAX_PAYLOAD or kind not in KINDS:
                if MARKER.startswith(buffer[at : at + SYNC_BYTES]):
                    break  # the rest of it is still under way
                raise ProtocolError(f"no frame: length {length}, kind {kind}")
            end = at + HEADER.size + length
            if len(buffer) < end:
                break
            with memoryview(buffer) as view:
                payload = bytes(view[at + HEADER.size : end])
            at = end
            if kind == PART or self._message:
                self._join(stream, kind, payload)
                if kind == PART:
                    continue
                payload = bytes(self._message)
                self._message.clear()
            out.append((stream, kind, payload))
        if at:
            consumed = buffer[max(0, at - SYNC_BYTES + 1) : at]
            self._tail = (self._tail + consumed)[-(SYNC_BYTES - 1) :]
            del buffer[:at]
            self._searched = max(0, self._searched - at)
        return out

    def discard(self) -> None:
        """Forget all but what may be the beginning of a MARKER and its nonce."""
        self._tail = (self._tail + self._buffer)[-(SYNC_BYTES - 1) :]
        self._buffer.clear()
        self._searched = 0
        self._message.clear()

    def _join(self, stream: int, kind: int, payload: bytes) -> None:
        if self._message and (stream != self._message_stream or kind not in (PART, *MESSAGES)):
            raise ProtocolError(f"a frame of kind {kind} in the middle of a message")
        if kind == PART and not payload:
            raise ProtocolError("a part of nothing")
        self._message_stream = stream
        self._message += payload
        if len(self._message) > MAX_MESSAGE:
            raise ProtocolError(f"a message of more than {MAX_MESSAGE} bytes")
