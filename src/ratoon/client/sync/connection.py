# Made from ../aio/connection.py by scripts/make_sync.py: change it there.
"""Requests to a daemon, and conversations with it: HTTP and WebSockets, wherever it is."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from urllib.parse import quote, urlencode

from ratoon.client.address import Address, Source
from ratoon.client.problems import cut_short, error_from, explained
from ratoon.client.sync.concurrency import Lock, in_thread
from ratoon.client.sync.conversations import Conversation, Conversations
from ratoon.client.sync.http import Answer, Content, Http
from ratoon.errors import Unreachable

Query = Mapping[str, object]


def segment(name: str) -> str:
    """`name` as one part of a URL's path."""
    return "%2E" * len(name) if name in (".", "..") else quote(name, safe="")


class Connection:
    """The way to one daemon, which is found, and started if it is to be, at the first request.

    Every method raises the RatoonError that the daemon answers with, and Unreachable.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._conversations = Conversations()
        self._finding = Lock()
        self._closed = False
        self._found: tuple[Address, Http] | None = None

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Query | None = None,
        body: Mapping[str, Any] | None = None,
        content: Content = b"",
    ) -> Any:
        """The JSON that is answered; None if that is empty."""
        answer, _ = self.send(method, path, query=query, body=body, content=content)
        return answer

    def send(
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
        address, http = self._find()
        asking = http.request(method, _target(path, query), headers=headers, content=content)
        with explained(address), asking as answer:
            answered = answer.read()
        if answer.is_error:
            raise error_from(answer.status, answered)
        return json.loads(answered) if answered else None, answer.headers

    @contextmanager
    def pieces(self, path: str, *, query: Query | None = None) -> Iterator[Iterator[bytes]]:
        """What is answered to a GET, piece by piece, as fast as it is taken."""
        address, http = self._find()

        def read(answer: Answer) -> Generator[bytes, None, None]:
            with cut_short(path), closing(answer.pieces()) as pieces:
                yield from pieces

        with ExitStack() as held:
            with explained(address):
                asking = http.request("GET", _target(path, query))
                answer = held.enter_context(asking)
                if answer.is_error:
                    raise error_from(answer.status, answer.read())
            yield held.enter_context(closing(read(answer)))

    @contextmanager
    def converse(self, path: str, *, query: Query | None = None) -> Iterator[Conversation]:
        """A WebSocket, which is closed with the block."""
        address, _ = self._find()
        with self._conversations.open(address, _target(path, query)) as talk:
            yield talk

    def close(self) -> None:
        """No more requests will be made."""
        with self._finding:
            self._closed = True
            if self._found:
                self._found[1].close()
                self._found = None
        self._conversations.close()
        in_thread(self._source.close)

    def _find(self) -> tuple[Address, Http]:
        with self._finding:
            if self._closed:
                raise Unreachable("this client was closed; make another one")
            if self._found is None:
                address = in_thread(self._source.find)
                self._found = address, Http(address)
            return self._found


def begun(talk: Conversation) -> dict[str, Any]:
    """What is said of something that has started."""
    message = talk.receive()
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
