# Made from ../aio/trees.py by scripts/make_sync.py: change it there.
"""Files and trees between this host and a sandbox. What comes from a guest is not trusted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from ratoon.api.files import Transfer
from ratoon.client.files import OnBytes
from ratoon.client.local_trees import exhaust, local_errors, refused
from ratoon.client.sync.concurrency import in_thread
from ratoon.client.sync.connection import Connection
from ratoon.machine.guest.shared.packing import MAX_LISTED, Packer
from ratoon.machine.guest.shared.unpacking import Bounds, Unpacker

#: What a tree may have at most, if a guest sends it.
MAX_BYTES = 16 * 1024**3
MAX_ENTRIES = 1_000_000
#: Bytes read from a file at once.
CHUNK = 256 * 1024


def reading(local: Path, on_bytes: OnBytes) -> tuple[Iterator[bytes], int, os.stat_result]:
    """The content of a file of this host piece by piece, its size, and its status."""
    with local_errors():
        if not stat.S_ISREG(local.stat().st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "neither a file nor a directory", str(local))
        file = local.open("rb")

    def pieces() -> Iterator[bytes]:
        sent = 0
        with file, local_errors():
            while piece := in_thread(file.read, CHUNK):
                yield piece
                sent += len(piece)
                on_bytes(sent)

    status = os.fstat(file.fileno())
    return pieces(), status.st_size, status


def upload(
    connection: Connection,
    files: str,
    local: Path,
    query: Mapping[str, object],
    on_bytes: OnBytes,
    *,
    owners: bool,
) -> Transfer:
    """See `Files.upload`, of a directory."""
    with local_errors():
        packer = Packer(os.fsencode(local.absolute()), owners=owners)
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        chunks = packer.chunks()
        try:
            with local_errors():
                while chunk := in_thread(next, chunks, b""):
                    yield chunk
                    sent += len(chunk)
                    on_bytes(sent)
        finally:
            chunks.close()

    query = {**query, "owners": owners}
    answer = connection.ask("PUT", f"{files}/tar", query=query, content=pieces())
    ours, theirs = packer.left_out, answer["left_out"]
    left_out = [*ours.listed, *theirs][:MAX_LISTED]
    return Transfer(packer.entries, sent, left_out, ours.count + answer["left_out_count"])


def download(
    connection: Connection,
    files: str,
    path: str,
    local: Path,
    *,
    merge: bool,
    owners: bool,
    on_bytes: OnBytes,
) -> Transfer:
    """See `Files.download`."""
    bounds = Bounds(MAX_BYTES, MAX_ENTRIES)
    target = os.fsencode(local.absolute())
    unpacker = Unpacker(target, merge=merge, owners=owners, bounds=bounds)

    def unpack(pieces: Iterator[bytes]) -> int:
        received = 0
        with local_errors(), refused(path):
            for data in pieces:
                in_thread(exhaust, unpacker.feed(data))
                received += len(data)
                on_bytes(received)
            in_thread(unpacker.finish)
        return received

    query = {"path": path, "owners": owners}
    try:
        with connection.pieces(f"{files}/tar", query=query) as pieces:
            size = unpack(pieces)
    finally:
        with local_errors():
            in_thread(exhaust, unpacker.close())
    left_out = unpacker.left_out
    return Transfer(unpacker.entries, size, left_out.listed, left_out.count)
