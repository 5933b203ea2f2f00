"""WebSockets: a JSON object in each text, bytes in each binary message, and errors as texts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from ratoon import files
from ratoon.concurrency import run_alongside
from ratoon.daemon.models.common import Request
from ratoon.daemon.problems import error_fields, explain
from ratoon.errors import InvalidInput, RatoonError

Model = TypeVar("Model", bound=Request)

#: Seconds for a client to say what it wants.
OPENING_TIMEOUT = 30.0
#: Bytes in a message; clients limit what they take at once.
MAX_MESSAGE = 256 * 1024


#: Among the extensions of a scope: whether the client has left, told without reading from it.
HUNG_UP = "ratoon.hung_up"
#: Seconds between looks at that.
LOOK = 0.5


class Conversation:
    """One accepted WebSocket. Every method raises WebSocketDisconnect once the client is gone."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def send_json(self, **fields: Any) -> None:
        """Send an object; names of files that are not UTF-8 come through, escaped."""
        await self._socket.send_text(json.dumps(fields))

    async def send(self, data: bytes, *, prefix: bytes = b"") -> None:
        """Send bytes, as fast as the client takes them; `prefix` begins each message."""
        for start in range(0, len(data), MAX_MESSAGE):
            await self._socket.send_bytes(prefix + data[start : start + MAX_MESSAGE])

    async def receive(self) -> bytes | dict[str, Any]:
        """What the client sends next. InvalidInput: a text that is no object."""
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message["code"])
        if message.get("bytes") is not None:
            return bytes(message["bytes"])
        try:
            found = json.loads(message["text"])
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise InvalidInput("a text message has to be a JSON object")
        return found

    async def opening(self, kind: type[Model]) -> Model:
        """The client's first message. InvalidInput, ValidationError: it is none."""
        try:
            async with asyncio.timeout(OPENING_TIMEOUT):
                found = await self.receive()
        except TimeoutError:
            raise InvalidInput(f"nothing was asked for within {OPENING_TIMEOUT:g} s") from None
        if isinstance(found, bytes):
            raise InvalidInput("the first message has to be a JSON object that says what to do")
        return kind.model_validate(found)

    async def while_there(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`, which may take long, and during which nothing is heard; not without a client.

        What it has sent before it left waits to be read: so its leaving is not among that.
        """
        hung_up = self._socket.scope["extensions"].get(HUNG_UP, lambda: False)

        async def look() -> NoReturn:
            while not hung_up():
                await asyncio.sleep(LOOK)
            raise WebSocketDisconnect

        await run_alongside(work, look())

    async def until_gone(self) -> NoReturn:
        """WebSocketDisconnect once the client is gone; what it says is dropped."""
        while True:
            await self.receive()


@asynccontextmanager
async def conversation(socket: WebSocket) -> AsyncIterator[Conversation]:
    """Accept the socket, and close it in the end; an error is said before that.

    If the client goes away, the block ends.
    """
    await socket.accept()
    talk = Conversation(socket)
    with suppress(WebSocketDisconnect):
        try:
            yield talk
        except ValidationError as error:
            status, text = explain(error.errors())
            await talk.send_json(error=text, kind="InvalidInput", status=status)
        except RatoonError as error:
            await talk.send_json(**error_fields(error), status=error.http_status)
        except OSError as error:
            await talk.send_json(error=files.describe(error), kind="HostError", status=500)
        await socket.close()
