"""What happens to sandboxes and snapshots, told to whoever listens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ratoon.api.answers import Event, EventKind

#: Events kept for a listener that does not look; older ones are lost.
BACKLOG = 1000


class Listener:
    """Hears what happens."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    def put(self, event: Event) -> None:
        if len(self._events) >= BACKLOG:
            self._events.clear()
            event = _now("overflow")
        self._events.append(event)
        self._arrived.set()

    def end(self) -> None:
        self._ended = True
        self._arrived.set()

    async def next(self) -> Event | None:
        """The next event; waits for it. None: no more will come."""
        while not self._events:
            if self._ended:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._events.popleft()


class Events:
    """Tells all listeners; nobody waits for any of them."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()
        #: The last progress of each thing that is being made.
        self._under_way: dict[object, Event | None] = {}

    def tell(
        self,
        kind: EventKind,
        *,
        sandbox: str | None = None,
        snapshot: str | None = None,
        reason: str | None = None,
        exit_code: int | None = None,
    ) -> None:
        self._put(_now(kind, sandbox, snapshot, reason, exit_code))

    @contextmanager
    def making(self, snapshot: str) -> Iterator[Callable[[str], None]]:
        """What is given tells how far the making of `snapshot` is, until the block ends.

        Who begins to listen meanwhile hears first what was told last: the next may be long to come.
        """
        work = object()
        self._under_way[work] = None

        def tell(reason: str) -> None:
            if work in self._under_way:  # a thread may be late
                event = self._under_way[work] = _now("progress", None, snapshot, reason)
                self._put(event)

        try:
            yield tell
        finally:
            del self._under_way[work]

    def end(self) -> None:
        """No more will come for those who listen."""
        for listener in self._listeners:
            listener.end()

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        listener = Listener()
        for event in self._under_way.values():
            if event is not None:
                listener.put(event)
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)

    def _put(self, event: Event) -> None:
        for listener in self._listeners:
            listener.put(event)


def _now(
    kind: EventKind,
    sandbox: str | None = None,
    snapshot: str | None = None,
    reason: str | None = None,
    exit_code: int | None = None,
) -> Event:
    return Event(kind, sandbox, snapshot, reason, time.time(), exit_code)
