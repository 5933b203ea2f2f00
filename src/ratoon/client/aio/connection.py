"""Requests to a daemon, and conversations with it: HTTP and WebSockets, wherever it is."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any
from urllib.parse import quote, urlencode

from ratoon.client.address import Address, Source
from ratoon.client.aio.concurrency import Lock, in_thread
from ratoon.client.aio.conversations import AsyncConversation, AsyncConversations
from ratoon.client.aio.http import AsyncAnswer, AsyncHttp, Content
from ratoon.client.problems import cut_short, error_from, explained
from ratoon.errors import Unreachable

Query = Mapping[str, object]


def segment(name: str) -> str:
    """`name` as one part of a URL's path."""
    return "%2E" * len(name) if name in (".", "..") else quote(name, safe="")


class AsyncConnection:
    """The way to one daemon, which is found, and started if it is to be, at the first request.

    Every method raises the RatoonError that the daemon answers with, and Unreachable.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._conversations = AsyncConversations()
        self._finding = Lock()
        self._closed = False
        self._found: tuple[Address, AsyncHttp] | None = None

    async def ask(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Mapping[str, Any] | None = None,
        content: Content = b"",
    ) -> Any:
        """The JSON that is answered; None if that is empty."""
        answer, _ = await self.send(method, path, query=query, body=body, content=content)
        return answer

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Mapping[str, Any] | None = None,
        content: Content = b"",
    ) -> tuple[Any, Mapping[str, str]]:
        """The same with its headers. `body` is sent as JSON, `content` as it is."""
        headers = {}
        if body is not None:
            content = json.dumps(body).encode()
            headers["content-type"] = "application/json"
        address, http = await self._find()
        asking = http.request(method, _target(path, query), headers=headers, content=content)
        with explained(address):
            async with asking as answer:
                answered = await answer.read()
        if answer.is_error:
            raise error_from(answer.status, answered)
        return json.loads(answered) if answered else None, answer.headers

    @asynccontextmanager
    async def pieces(
        self, path: str, *, query: Query | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """What is answered to a GET, piece by piece, as fast as it is taken."""
        address, http = await self._find()

        async def read(answer: AsyncAnswer) -> AsyncGenerator[bytes, None]:
            with cut_short(path):
                async with aclosing(answer.pieces()) as pieces:
                    async for piece in pieces:
                        yield piece

        async with AsyncExitStack() as held:
            with explained(address):
                asking = http.request("GET", _target(path, query))
                answer = await held.enter_async_context(asking)
                if answer.is_error:
                    raise error_from(answer.status, await answer.read())
            yield await held.enter_async_context(aclosing(read(answer)))

    @asynccontextmanager
    async def converse(
        self, path: str, *, query: Query | None = None
    ) -> AsyncIterator[AsyncConversation]:
        """A WebSocket, which is closed with the block."""
        address, _ = await self._find()
        async with self._conversations.open(address, _target(path, query)) as talk:
            yield talk

    async def close(self) -> None:
        """No more requests will be made."""
        async with self._finding:
            self._closed = True
            if self._found:
                self._found[1].close()
                self._found = None
        await self._conversations.close()
        await in_thread(self._source.close)

    async def _find(self) -> tuple[Address, AsyncHttp]:
        async with self._finding:
            if self._closed:
                raise Unreachable("this client was closed; make another one")
            if self._found is None:
                address = await in_thread(self._source.find)
                self._found = address, AsyncHttp(address)
            return self._found


async def begun(talk: AsyncConversation) -> dict[str, Any]:
    """What is said of something that has started."""
    message = await talk.receive()
    if not isinstance(message, dict) or not isinstance(message.get("started"), dict):
        raise Unreachable("the daemon closed before it had started what was asked for")
    started: dict[str, Any] = message["started"]
    return started


def _target(path: str, query: Query | None) -> str:
    """`path` with the query's fields that are not None; a surrogate stands for a byte."""
    words = [
        (name, str(each).lower() if isinstance(each, bool) else str(each))
        for name, value in (query or {}).items()
        for each in (value if isinstance(value, list) else [value])
        if each is not None
    ]
    return path + ("?" + urlencode(words, errors="surrogateescape") if words else "")
