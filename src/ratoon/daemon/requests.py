"""What a request is besides its JSON: a query, byte for byte, a body, piece by piece, and a client.

Some work is worth doing only for as long as the one who asked for it is there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Annotated, Any, NoReturn, TypeVar
from urllib.parse import parse_qsl

from pydantic import BeforeValidator
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.types import Receive

from ratoon.concurrency import run_alongside
from ratoon.errors import RatoonError

T = TypeVar("T")

#: Bytes of a body that are read on after it was refused, so that the client comes to the answer.
DRAIN_LIMIT = 64 * 1024 * 1024

#: `?cascade` alone means yes.
Flag = Annotated[bool, BeforeValidator(lambda value: value == "" or value)]


def raw_parameter(connection: HTTPConnection, name: str) -> str:
    """A parameter that is there, as it was sent: elsewhere, bytes that are not UTF-8 are replaced.

    They become lone surrogates, as with `os.fsdecode`.
    """
    query: bytes = connection.scope["query_string"]
    pairs = parse_qsl(
        query.decode("latin-1"),
        keep_blank_values=True,
        errors="surrogateescape",
    )
    return dict(pairs)[name]


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client goes away: then ClientDisconnect.

    The body of the request has been read.
    """
    return await run_alongside(work, until_gone(request.receive))


async def until_gone(receive: Receive) -> NoReturn:
    """ClientDisconnect, once the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


@asynccontextmanager
async def draining(request: Request) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body of a request, piece by piece. Where the block fails, the rest of it is read on.

    A client that is still sending would not see the answer otherwise.
    """
    pieces = request.stream()
    try:
        yield pieces
    except RatoonError:
        drained = 0
        async for piece in pieces:
            drained += len(piece)
            if drained > DRAIN_LIMIT:
                break
        raise
