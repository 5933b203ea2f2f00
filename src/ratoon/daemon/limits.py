"""How much one request may take, in bytes and in time, and how many may be at something."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratoon.daemon.problems import error_response
from ratoon.errors import Overloaded


class Limits:
    """Refuses bodies that are too long, and gives up requests that take too long.

    A route that passes its body on, and holds none of it, has a `max_body_size` of its own.
    """

    def __init__(self, app: ASGIApp, body_bytes: int, seconds: float) -> None:
        self._app = app
        self._body_bytes = body_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            limit = getattr(scope.get("route"), "max_body_size", None) or self._body_bytes
            if received > limit:
                raise HTTPException(413, f"the body is longer than {limit} bytes")
            return message

        deadline = asyncio.timeout(self._seconds)

        async def begun(message: Message) -> None:
            if message["type"] == "http.response.start":
                deadline.reschedule(None)
            await send(message)

        try:
            async with deadline:
                await self._app(scope, bounded, begun)
        except TimeoutError:
            if not deadline.expired():
                raise
            text = f"it was not answered within {self._seconds:g} s, and given up"
            await error_response(504, text, "Timeout")(scope, receive, send)


class Slots:
    """So many may be at something at a time."""

    def __init__(self, cap: int, what: str) -> None:
        self.cap = cap
        self.taken = 0
        self._what = what

    @contextmanager
    def take(self) -> Iterator[None]:
        """Overloaded if all are taken."""
        if self.taken >= self.cap:
            raise Overloaded(
                f"{self._what} under way: {self.taken}, and no more than {self.cap} may be; "
                "try again later"
            )
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
