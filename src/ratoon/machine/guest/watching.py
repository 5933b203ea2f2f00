"""What happens in a directory of the guest, while somebody watches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast, get_args

from ratoon.api.files import FileEvent, FileEventKind
from ratoon.errors import GuestError
from ratoon.machine.guest.channel import Agent, GuestStream
from ratoon.machine.guest.file_requests import GuestPath, conversation, file_errors, lines


@asynccontextmanager
async def watch(
    agent: Agent, path: GuestPath, *, recursive: bool = False
) -> AsyncIterator[AsyncIterator[FileEvent]]:
    """See `GuestFiles.watch`."""
    async with conversation(agent, "files.watch", path, recursive=recursive) as stream:
        with file_errors():
            await stream.started()
        yield _events(stream)


async def _events(stream: GuestStream) -> AsyncIterator[FileEvent]:
    async for line in lines(stream):
        kind, path, old_path = line.get("event"), line.get("path"), line.get("old_path")
        if (
            kind not in get_args(FileEventKind)
            or not isinstance(path, str)
            or not isinstance(line.get("is_directory"), bool)
            or isinstance(old_path, str) != (kind == "renamed")
        ):
            raise GuestError(f"{stream.name} sent an event that is none")
        yield FileEvent(cast("FileEventKind", kind), path, line["is_directory"], old_path)
