"""WebSockets to a daemon, for those who wait: an event loop in a thread has them.

Written by hand. In a thread's own WebSocket, what is being sent would hold up what is received.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ratoon.client.address import Address
from ratoon.client.aio.conversations import AsyncConversation, AsyncConversations
from ratoon.errors import Unreachable

T = TypeVar("T")


class Conversation:
    """Messages to a daemon and from it. What is not received holds up the daemon's side.

    One thread may send while another one receives.
    """

    def __init__(self, loop: _Loop, talk: AsyncConversation) -> None:
        self._loop = loop
        self._talk = talk

    def send_json(self, **fields: Any) -> None:
        """Send an object."""
        self._loop.run(self._talk.send_json(**fields))

    def send(self, data: bytes) -> None:
        """Send bytes. Waits until the daemon takes them."""
        self._loop.run(self._talk.send(data))

    def receive(self) -> bytes | dict[str, Any] | None:
        """The next message: bytes, or an object; None once the daemon has closed.

        An object that tells of an error raises that.
        """
        return self._loop.run(self._talk.receive())


class Conversations:
    """Opens them, and closes those that nobody else has closed."""

    def __init__(self) -> None:
        self._starting = threading.Lock()
        self._loop: _Loop | None = None
        self._conversations = AsyncConversations()

    @contextmanager
    def open(self, address: Address, target: str) -> Iterator[Conversation]:
        """A WebSocket at `target` of a daemon, which is closed with the block."""
        with self._starting:
            loop = self._loop = self._loop or _Loop()
        opening = self._conversations.open(address, target)
        talk = loop.run(opening.__aenter__())
        try:
            yield Conversation(loop, talk)
        finally:
            # The garbage collector may get here in any thread, and at the very end.
            if loop.can_be_waited_for:
                loop.run(opening.__aexit__(None, None, None))

    def close(self) -> None:
        """There will be no more; those that are open end."""
        with self._starting:
            if self._loop:
                self._loop.run(self._conversations.close())
                self._loop.close()
            self._loop = None


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="ratoon-streams", daemon=True)
        self._thread.start()

    @property
    def can_be_waited_for(self) -> bool:
        """Not so once it is closed, for its own thread, or when the program ends."""
        gone = self._loop.is_closed() or sys.is_finalizing()
        return not gone and threading.current_thread() is not self._thread

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; it is cancelled if whoever waits is interrupted."""
        if not self.can_be_waited_for:
            work.close()
            raise Unreachable("this client was closed; make another one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.get_loop().run_forever()
