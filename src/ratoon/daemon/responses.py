"""Answers that are not plain JSON of a model."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ratoon.concurrency import run_alongside
from ratoon.daemon.requests import until_gone
from ratoon.errors import RatoonError

log = logging.getLogger(__name__)


class AsciiJson(JSONResponse):
    """JSON that escapes what is not ASCII: names of files that are not UTF-8 come through."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


class Pieces(Response):
    """What comes piece by piece, sent as fast as it is taken; `held` ends with it.

    If the client goes away, no more is asked for. If the pieces fail, the connection is cut: that
    is how a client sees that it does not have all.
    """

    def __init__(
        self, pieces: AsyncIterator[bytes], held: AsyncExitStack, *, media_type: str
    ) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self._pieces = pieces
        self._held = held

    @classmethod
    async def begin(
        cls, pieces: AsyncIterator[bytes], held: AsyncExitStack, *, media_type: str
    ) -> Pieces:
        """One whose first piece is there: what fails before that can be answered as an error.

        It takes over what is `held`.
        """
        first = await anext(pieces, b"")

        async def all_of_them() -> AsyncIterator[bytes]:
            yield first
            async for piece in pieces:
                yield piece

        return cls(all_of_them(), held.pop_all(), media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            try:
                await run_alongside(self._send(send), until_gone(receive))
            except ClientDisconnect:
                log.info("%s: the client went away", scope["path"])
            except (RatoonError, OSError) as error:
                log.warning("%s was cut short: %s", scope["path"], error)

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async for piece in self._pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})
