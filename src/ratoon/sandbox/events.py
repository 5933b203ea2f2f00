"""What happens to sandboxes and snapshots, told to whoever listens."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

EventKind = Literal[
    "created",
    "killed",
    "died",
    "standby",
    "resumed",
    "reset",
    "branched",
    "snapshot_ready",
    "snapshot_failed",
    "snapshot_deleted",
    "progress",
    "overflow",
]

#: Events kept for a listener that does not look; older ones are lost.
BACKLOG = 1000


@dataclass(frozen=True)
class Event:
    """Something happened to `sandbox`, or `snapshot`: a branch is of both.

    progress: `reason` says how far the making of `snapshot` is. overflow: the listener did not
    look, and so lost events.
    """

    kind: EventKind
    sandbox: str | None = None
    snapshot: str | None = None
    reason: str | None = None
    at_unix: float = field(default_factory=time.time)


class Listener:
    """Hears what happens from now on."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._ended = False

    def put(self, event: Event) -> None:
        if len(self._events) >= BACKLOG:
            self._events.clear()
            event = Event("overflow")
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

    def tell(
        self,
        kind: EventKind,
        *,
        sandbox: str | None = None,
        snapshot: str | None = None,
        reason: str | None = None,
    ) -> None:
        event = Event(kind, sandbox, snapshot, reason)
        for listener in self._listeners:
            listener.put(event)

    def end(self) -> None:
        """No more will come for those who listen."""
        for listener in self._listeners:
            listener.end()

    @contextmanager
    def listen(self) -> Iterator[Listener]:
        listener = Listener()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)
