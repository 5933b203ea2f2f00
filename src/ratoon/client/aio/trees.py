"""Files and trees between this host and a sandbox. What comes from a guest is not trusted."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from ratoon.api.files import Transfer
from ratoon.client.aio.concurrency import in_thread
from ratoon.client.aio.connection import AsyncConnection
from ratoon.client.files import OnBytes
from ratoon.client.local_trees import exhaust, local_errors, refused
from ratoon.machine.guest.shared.packing import MAX_LISTED, Packer
from ratoon.machine.guest.shared.unpacking import Bounds, Unpacker

#: What a tree may have at most, if a guest sends it.
MAX_BYTES = 16 * 1024**3
MAX_ENTRIES = 1_000_000
#: Bytes read from a file at once.
CHUNK = 256 * 1024


def reading(local: Path, on_bytes: OnBytes) -> tuple[AsyncIterator[bytes], int, os.stat_result]:
    """The content of a file of this host piece by piece, its size, and its status."""
    with local_errors():
        if not stat.S_ISREG(local.stat().st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "neither a file nor a directory", str(local))
        file = local.open("rb")

    async def pieces() -> AsyncIterator[bytes]:
        sent = 0
        with file, local_errors():
            while piece := await in_thread(file.read, CHUNK):
                yield piece
                sent += len(piece)
                on_bytes(sent)

    status = os.fstat(file.fileno())
    return pieces(), status.st_size, status


async def upload(
    connection: AsyncConnection,
    files: str,
    local: Path,
    query: Mapping[str, object],
    on_bytes: OnBytes,
    *,
    owners: bool,
) -> Transfer:
    """See `AsyncFiles.upload`, of a directory."""
    with local_errors():
        packer = Packer(os.fsencode(local.absolute()), owners=owners)
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        chunks = packer.chunks()
        try:
            with local_errors():
                while chunk := await in_thread(next, chunks, b""):
                    yield chunk
                    sent += len(chunk)
                    on_bytes(sent)
        finally:
            chunks.close()

    query = {**query, "owners": owners}
    answer = await connection.ask("PUT", f"{files}/tar", query=query, content=pieces())
    ours, theirs = packer.left_out, answer["left_out"]
    left_out = [*ours.listed, *theirs][:MAX_LISTED]
    return Transfer(packer.entries, sent, left_out, ours.count + answer["left_out_count"])


async def download(
    connection: AsyncConnection,
    files: str,
    path: str,
    local: Path,
    *,
    merge: bool,
    owners: bool,
    on_bytes: OnBytes,
) -> Transfer:
    """See `AsyncFiles.download`."""
    bounds = Bounds(MAX_BYTES, MAX_ENTRIES)
    target = os.fsencode(local.absolute())
    unpacker = Unpacker(target, merge=merge, owners=owners, bounds=bounds)

    async def unpack(pieces: AsyncIterator[bytes]) -> int:
        received = 0
        with local_errors(), refused(path):
            async for data in pieces:
                await in_thread(exhaust, unpacker.feed(data))
                received += len(data)
                on_bytes(received)
            await in_thread(unpacker.finish)
        return received

    query = {"path": path, "owners": owners}
    try:
        async with connection.pieces(f"{files}/tar", query=query) as pieces:
            size = await unpack(pieces)
    finally:
        with local_errors():
            await in_thread(exhaust, unpacker.close())
    left_out = unpacker.left_out
    return Transfer(unpacker.entries, size, left_out.listed, left_out.count)
