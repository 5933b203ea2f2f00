"""What all requests about the guest's files share: paths, errors, and output in pieces or lines."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from ratoon.errors import (
    GuestAccessDenied,
    GuestError,
    GuestFileError,
    GuestFileExists,
    GuestFileNotFound,
    GuestIsADirectory,
    GuestNoSpace,
    GuestNotADirectory,
    InvalidInput,
)
from ratoon.machine.guest.channel import Agent, GuestStream
from ratoon.machine.guest.shared import wire

#: A path in the guest, relative to `/` if it does not begin there. Names are bytes on Linux: text
#: stands for its UTF-8, and a byte that is none for what `os.fsdecode` makes of it. What comes back
#: is text of that kind.
GuestPath = str | bytes | os.PathLike[str]

#: Seconds that something short may take; a loaded host under emulation is slow.
TIMEOUT = 60.0
#: Bytes of one line; two paths of PATH_MAX bytes fit, each byte written as JSON writes it at worst.
MAX_LINE = 64 * 1024

_ERRORS: dict[str, type[GuestFileError]] = {
    "ENOENT": GuestFileNotFound,
    "EEXIST": GuestFileExists,
    "ENOTEMPTY": GuestFileExists,
    "ENOTDIR": GuestNotADirectory,
    "EISDIR": GuestIsADirectory,
    "EACCES": GuestAccessDenied,
    "EPERM": GuestAccessDenied,
    "EROFS": GuestAccessDenied,
    "ENOSPC": GuestNoSpace,
    "EDQUOT": GuestNoSpace,
}
_ERRNOS = frozenset(errno.errorcode.values())


def guest_path(path: GuestPath) -> str:
    """`path` as a request has it; InvalidInput if no file can be called so."""
    raw = os.fspath(path)
    found = raw.decode("utf-8", "surrogateescape") if isinstance(raw, bytes) else raw
    try:
        encoded = found.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InvalidInput(f"{found!r} cannot be a path: it is no text of bytes") from None
    if not encoded or b"\0" in encoded:
        raise InvalidInput(f"{found!r} cannot be a path in a guest")
    return found


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn a refusal of the guest's system into the GuestFileError for it."""
    try:
        yield
    except GuestError as error:
        if error.kind == "no-user":
            raise InvalidInput(str(error)) from None
        if type(error) is not GuestError or error.kind not in _ERRNOS:
            raise
        known = _ERRORS.get(error.kind, GuestFileError)
        raise known(str(error), kind=error.kind) from None


async def ask(agent: Agent, op: str, path: GuestPath, **fields: Any) -> dict[str, Any]:
    """A short question about `path`."""
    with file_errors():
        return await agent.request(op, timeout=TIMEOUT, path=guest_path(path), **fields)


@asynccontextmanager
async def conversation(
    agent: Agent, op: str, path: GuestPath, **fields: Any
) -> AsyncIterator[GuestStream]:
    """A longer one; leaving it early cancels it."""
    with file_errors():
        async with agent.open(op, path=guest_path(path), **fields) as stream:
            yield stream


async def output(stream: GuestStream) -> AsyncIterator[bytes]:
    """All that the guest sends, until it has replied; GuestFileError if that is a refusal."""
    with file_errors():
        while (piece := await stream.read()) is not None:
            kind, data = piece
            if kind != wire.STDOUT:
                raise GuestError(f"{stream.name} sent output of a kind that nobody asked for")
            yield data
        await stream.result()


async def lines(stream: GuestStream) -> AsyncIterator[dict[str, Any]]:
    """The same where it is a JSON object in each line; anything else is a GuestError."""
    left = b""
    async for data in output(stream):
        *whole, left = (left + data).split(b"\n")
        for line in whole:
            yield _object(stream, line)
        if len(left) > MAX_LINE:
            break
    if left:
        _object(stream, left[:MAX_LINE])
        raise GuestError(f"{stream.name} sent a line without an end")


def _object(stream: GuestStream, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise GuestError(f"{stream.name} sent a line that is no JSON object")
    return found
