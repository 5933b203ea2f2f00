"""Trees on their way into a guest, as archives. Only what is on its way is held in memory."""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Any

from ratoon.api.files import Transfer
from ratoon.concurrency import run_alongside
from ratoon.errors import GuestError, InvalidInput
from ratoon.machine.guest.channel import Agent, GuestStream, printable
from ratoon.machine.guest.file_requests import GuestPath, conversation
from ratoon.machine.guest.shared.packing import MAX_LISTED


async def extract(
    agent: Agent,
    path: GuestPath,
    archive: AsyncIterable[bytes],
    *,
    merge: bool,
    owners: bool,
    user: str | None,
    parents: bool,
) -> Transfer:
    """See `GuestFiles.extract`."""
    fields = {"merge": merge, "owners": owners, "user": user, "parents": parents, "into": True}
    sent = 0

    async def feed(stream: GuestStream) -> None:
        nonlocal sent
        async for piece in archive:
            await stream.write(piece)
            sent += len(piece)
        stream.end_input()

    try:
        async with conversation(agent, "files.unpack", path, **fields) as stream:
            reply = await run_alongside(stream.result(), feed(stream))
    except GuestError as error:
        if error.kind == "archive":
            raise InvalidInput(str(error)) from None
        raise
    entries = reply.get("entries")
    if type(entries) is not int:
        raise GuestError(f"{stream.name} did not say how the transfer ended")
    return Transfer(entries, sent, *_left_out(stream, reply))


def _left_out(stream: GuestStream, reply: dict[str, Any]) -> tuple[list[str], int]:
    """What the guest says that it left out, and how much that was."""
    listed, count = reply.get("left_out"), reply.get("left_out_count")
    if not isinstance(listed, list) or type(count) is not int:
        raise GuestError(f"{stream.name} did not say how the transfer ended")
    return [printable(line) for line in listed[:MAX_LISTED]], count
