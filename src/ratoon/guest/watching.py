"""What happens in a directory of the guest, while somebody watches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from ratoon.errors import GuestError
from ratoon.guest.channel import Agent, GuestStream
from ratoon.guest.file_requests import GuestPath, conversation, file_errors, lines

EventKind = Literal["created", "modified", "removed", "renamed", "overflow"]
_KINDS = frozenset(("created", "modified", "removed", "renamed", "overflow"))


@dataclass(frozen=True)
class FileEvent:
    """Something happened to `path`.

    renamed: it was `old_path` before. overflow: more happened below `path` than the guest's kernel
    kept; look for yourself. modified: its content; a run of writes may count as one. What was moved
    in from elsewhere counts as created, what was moved away as removed.
    """

    kind: EventKind
    path: str
    is_directory: bool
    old_path: str | None = None


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
            kind not in _KINDS
            or not isinstance(path, str)
            or not isinstance(line.get("is_directory"), bool)
            or isinstance(old_path, str) != (kind == "renamed")
        ):
            raise GuestError(f"{stream.name} sent an event that is none")
        yield FileEvent(kind, path, line["is_directory"], old_path)
