"""WebSockets to a daemon. `ratoon.client.sync` has a module of its own for them, which uses this.

That is because both directions have to go on at the same time, whichever of them is held up.
`websockets` is loaded with the first of them: few commands have any.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

from ratoon.client.address import CONNECT_TIMEOUT, Address
from ratoon.client.problems import ConnectionLost, error_from, explained, unreachable

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

#: Seconds that the closing of a conversation waits for the daemon.
CLOSE_TIMEOUT = 5.0
#: Bytes of one message: a daemon's are shorter.
MAX_MESSAGE = 4 * 1024 * 1024
#: Messages that have come and wait to be taken. The daemon waits when there are more.
MAX_WAITING = 4


class AsyncConversation:
    """Messages to a daemon and from it. What is not received holds up the daemon's side."""

    def __init__(self, address: Address, socket: ClientConnection) -> None:
        self._address = address
        self._socket = socket

    async def send_json(self, **fields: Any) -> None:
        """Send an object."""
        with explained(self._address), _noticed():
            await self._socket.send(json.dumps(fields))

    async def send(self, data: bytes) -> None:
        """Send bytes. Waits until the daemon takes them."""
        with explained(self._address), _noticed():
            await self._socket.send(data)

    async def receive(self) -> bytes | dict[str, Any] | None:
        """The next message: bytes, or an object; None once the daemon has closed.

        An object that tells of an error raises that.
        """
        from websockets.exceptions import ConnectionClosedOK

        with explained(self._address), _noticed():
            try:
                message = await self._socket.recv()
            except ConnectionClosedOK:
                return None
        if isinstance(message, bytes):
            return message
        found = json.loads(message)
        if not isinstance(found, dict):
            raise error_from(500, {"error": f"the daemon said {found!r}, which means nothing"})
        if "error" in found:
            raise error_from(int(found.get("status", 500)), found)
        return found


class AsyncConversations:
    """Opens them, and closes those that nobody else has closed."""

    def __init__(self) -> None:
        self._open: set[ClientConnection] = set()

    @asynccontextmanager
    async def open(self, address: Address, target: str) -> AsyncIterator[AsyncConversation]:
        """A WebSocket at `target` of a daemon, which is closed with the block."""
        from websockets.asyncio.client import connect, unix_connect
        from websockets.exceptions import InvalidStatus, WebSocketException

        options: dict[str, Any] = {
            "additional_headers": address.headers,
            "compression": None,
            "proxy": None,
            "open_timeout": CONNECT_TIMEOUT,
            "close_timeout": CLOSE_TIMEOUT,
            # Who does not take what has come does not see a ping either, and may well be alive.
            "ping_interval": None,
            "max_size": MAX_MESSAGE,
            "max_queue": MAX_WAITING,
        }
        url = "ws" + address.url.removeprefix("http") + target
        async with AsyncExitStack() as held:
            try:
                if address.socket:
                    connecting = unix_connect(address.socket, url, **options)
                else:
                    connecting = connect(url, ssl=address.tls, **options)
                socket = await held.enter_async_context(connecting)
            except InvalidStatus as error:
                answer = error.response
                raise error_from(answer.status_code, bytes(answer.body or b"")) from None
            except (OSError, WebSocketException) as error:
                raise unreachable(address, error) from error
            self._open.add(socket)
            held.callback(self._open.discard, socket)
            yield AsyncConversation(address, socket)

    async def close(self) -> None:
        """There will be no more; those that are open end."""
        await asyncio.gather(*(socket.close() for socket in self._open))


@contextmanager
def _noticed() -> Iterator[None]:
    """ConnectionLost: the WebSocket was closed."""
    from websockets.exceptions import ConnectionClosed

    try:
        yield
    except ConnectionClosed as error:
        raise ConnectionLost(str(error)) from error
