# Made from ../aio/http.py by scripts/make_sync.py: change it there.
"""HTTP to a daemon: what its clients need of it, and no more.

A client for all of the web takes longer to load than a fork takes. What HTTP is, `h11` knows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import h11

from ratoon.client.address import Address
from ratoon.client.problems import ConnectionLost
from ratoon.client.sync.transport import Transport

Content = bytes | Iterable[bytes]

#: Connections that are kept for the next requests.
_KEPT = 8


class Http:
    """Requests to the daemon at `address`, each on a connection that no other one uses meanwhile.

    Unreachable: nobody is there. ConnectionLost: the connection ended too early.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._headers = {
            "host": urlsplit(address.url).netloc,
            "accept-encoding": "identity",
            **address.headers,
        }
        self._idle: list[_Line] = []
        self._lines: set[_Line] = set()

    @contextmanager
    def request(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: Content = b"",
    ) -> Iterator[Answer]:
        """The answer, once it has begun; what is not read of it within the block is lost."""
        how = (
            {"content-length": str(len(content))}
            if isinstance(content, bytes)
            else {"transfer-encoding": "chunked"}
        )
        every = {**self._headers, **(headers or {}), **how}
        line = self._line()
        try:
            asked = h11.Request(method=method, target=target, headers=[*every.items()])
            yield Answer(line, line.ask(asked, content))
        finally:
            if line.is_done and line in self._lines and len(self._idle) < _KEPT:
                self._idle.append(line)
            else:
                self._drop(line)

    def close(self) -> None:
        """All connections end, also those in use."""
        for line in [*self._lines]:
            self._drop(line)

    def _line(self) -> _Line:
        while self._idle:
            with suppress(IndexError):  # another thread may take it first
                line = self._idle.pop()
                if line.is_fresh():
                    return line
                self._drop(line)
        line = _Line(Transport.open(self._address))
        self._lines.add(line)
        return line

    def _drop(self, line: _Line) -> None:
        self._lines.discard(line)
        line.close()


class Answer:
    """An answer that has begun. The names of `headers` are in small letters."""

    def __init__(self, line: _Line, head: h11.Response) -> None:
        self._line = line
        self.status = head.status_code
        self.headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}

    @property
    def is_error(self) -> bool:
        return self.status >= 400

    def pieces(self) -> Generator[bytes, None, None]:
        """Its body, as it comes."""
        while isinstance(event := self._line.next_event(), h11.Data):
            yield bytes(event.data)

    def read(self) -> bytes:
        """All of its body."""
        body = bytearray()
        for piece in self.pieces():
            body += piece
        return bytes(body)


class _Line:
    """A connection, and how far the two sides are."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._http = h11.Connection(h11.CLIENT)

    @property
    def is_done(self) -> bool:
        """Whether another request may follow."""
        return self._http.our_state is self._http.their_state is h11.DONE

    def is_fresh(self) -> bool:
        """Make it ready for another request, unless the daemon has closed it."""
        self._http.start_next_cycle()
        return self._transport.is_open

    def ask(self, request: h11.Request, content: Content) -> h11.Response:
        """The head of what is answered."""
        with suppress(ConnectionLost):  # who does not take all of it may have said why
            self._send(request)
            if isinstance(content, bytes):
                self._send(h11.Data(data=content))
            else:
                for piece in content:
                    self._send(h11.Data(data=piece))
            self._send(h11.EndOfMessage())
        while not isinstance(head := self.next_event(), h11.Response):
            pass  # it will come
        return head

    def next_event(self) -> Any:
        """The next that comes. ConnectionLost: there is none, or it is no HTTP."""
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(self._transport.read())
        except h11.RemoteProtocolError as error:
            raise ConnectionLost(str(error)) from error
        return event

    def close(self) -> None:
        self._transport.close()

    def _send(self, event: h11.Event) -> None:
        if data := self._http.send(event):
            self._transport.write(data)
