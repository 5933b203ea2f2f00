"""Files and trees between this host and a guest.

What comes from a guest is not trusted: `guest.agent.unpacking` says what that means. Only what is
on its way is held in memory. The host's file system is spoken to in threads, piece by piece.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratoon.concurrency import beside, to_the_end
from ratoon.errors import GuestError, InvalidInput
from ratoon.guest.agent.packing import MAX_LISTED, Packer
from ratoon.guest.agent.unpacking import Bounds, Unpacker
from ratoon.guest.channel import Agent, GuestStream, printable
from ratoon.guest.file_requests import GuestPath, conversation, output
from ratoon.guest.local_trees import exhaust, local_errors, refused

#: Called with the bytes that have been carried so far, headers included.
OnBytes = Callable[[int], None]

MAX_BYTES = 16 * 1024**3
MAX_ENTRIES = 1_000_000


@dataclass(frozen=True)
class Transfer:
    """What a transfer carried: files, directories and links, and bytes of the archive they made.

    `left_out` says of each thing that it did not carry why; the first thousand of them.
    """

    entries: int
    size_bytes: int
    left_out: tuple[str, ...]
    left_out_count: int


async def download(
    agent: Agent,
    path: GuestPath,
    local: Path,
    *,
    merge: bool,
    owners: bool,
    max_bytes: int,
    max_entries: int,
    progress: OnBytes,
) -> Transfer:
    """See `GuestFiles.download`."""
    local = local.resolve()
    bounds = Bounds(max_bytes, max_entries)
    unpacker = Unpacker(os.fsencode(local), merge=merge, owners=owners, bounds=bounds)
    received = _Counter(progress)
    try:
        async with conversation(agent, "files.pack", path, owners=owners) as stream:
            with local_errors(), refused(path):
                async for data in output(stream):
                    await _in_thread(exhaust, unpacker.feed(data))
                    received.add(len(data))
                theirs, their_count = _left_out(stream, await stream.result())
                await _in_thread(unpacker.finish)
    finally:
        with local_errors():
            await _in_thread(exhaust, unpacker.close())
    ours = unpacker.left_out
    left_out = (*theirs, *ours.listed)[:MAX_LISTED]
    return Transfer(unpacker.entries, received.count, left_out, their_count + ours.count)


async def upload(
    agent: Agent,
    local: Path,
    path: GuestPath,
    *,
    merge: bool,
    owners: bool,
    parents: bool,
    progress: OnBytes,
) -> Transfer:
    """See `GuestFiles.upload`."""
    local = local.absolute()
    with local_errors():
        packer = Packer(os.fsencode(local), owners=owners)
    fields = {"merge": merge, "owners": owners, "parents": parents, "into": False}
    async with conversation(agent, "files.unpack", path, **fields) as stream:
        sent = _Counter(progress)
        await beside(stream.result(), _feed(stream, packer, sent))
    left_out = packer.left_out
    return Transfer(packer.entries, sent.count, tuple(left_out.listed), left_out.count)


async def extract(
    agent: Agent,
    path: GuestPath,
    archive: AsyncIterable[bytes],
    *,
    merge: bool,
    owners: bool,
    parents: bool,
) -> Transfer:
    """See `GuestFiles.extract`."""
    fields = {"merge": merge, "owners": owners, "parents": parents, "into": True}
    sent = _Counter(lambda count: None)

    async def feed(stream: GuestStream) -> None:
        async for piece in archive:
            await stream.write(piece)
            sent.add(len(piece))
        stream.end_input()

    try:
        async with conversation(agent, "files.unpack", path, **fields) as stream:
            reply = await beside(stream.result(), feed(stream))
    except GuestError as error:
        if error.kind == "archive":
            raise InvalidInput(str(error)) from None
        raise
    entries = reply.get("entries")
    if type(entries) is not int:
        raise GuestError(f"{stream.name} did not say how the transfer ended")
    return Transfer(entries, sent.count, *_left_out(stream, reply))


async def _feed(stream: GuestStream, packer: Packer, sent: _Counter) -> None:
    chunks = packer.chunks()
    try:
        with local_errors():
            while chunk := await _in_thread(next, chunks, b""):
                await stream.write(chunk)
                sent.add(len(chunk))
    finally:
        chunks.close()
    stream.end_input()


class _Counter:
    """The bytes that have been carried, and who wants to know."""

    def __init__(self, progress: OnBytes) -> None:
        self.count = 0
        self._progress = progress

    def add(self, count: int) -> None:
        self.count += count
        self._progress(self.count)


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result. A cancellation waits for it: nobody else may touch what it works on."""
    return await to_the_end(asyncio.to_thread(function, *arguments))


def _left_out(stream: GuestStream, reply: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """What the guest says that it left out, and how much that was."""
    listed, count = reply.get("left_out"), reply.get("left_out_count")
    if not isinstance(listed, list) or type(count) is not int:
        raise GuestError(f"{stream.name} did not say how the transfer ended")
    return tuple(printable(line) for line in listed[:MAX_LISTED]), count
