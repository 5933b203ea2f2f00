"""Live branches: snapshots that are still being written while their sandboxes run on."""

from __future__ import annotations

import asyncio
import logging

from ratoon.engine.sandbox.branch import PendingSnapshot
from ratoon.engine.sandbox.events import Events
from ratoon.errors import Conflict, InFlight

log = logging.getLogger(__name__)


class BackgroundBranches:
    """By tag, until the snapshot is ready; a failed one until it is deleted, or made anew."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._live: dict[str, PendingSnapshot] = {}

    @property
    def all(self) -> tuple[PendingSnapshot, ...]:
        """Those that are being written, and those that failed."""
        return tuple(self._live.values())

    def add(self, live: PendingSnapshot) -> None:
        self._live[live.tag] = live
        live.done.add_done_callback(lambda done: self._written(live))

    def explain(self, tag: str) -> None:
        """Conflict: there is no snapshot `tag` because its writing failed, and why."""
        if (live := self._live.get(tag)) and live.status == "failed":
            raise Conflict(f"snapshot {tag} was not written: {live.reason}")

    def require_written(self, tag: str) -> None:
        """InFlight: snapshot `tag` is still being written."""
        if (live := self._live.get(tag)) and live.status == "writing":
            raise InFlight(f"snapshot {tag} is still being written; try again")

    def forget(self, tag: str) -> bool:
        """Forget a failure; whether there was one. InFlight: it is still being written."""
        self.require_written(tag)
        live = self._live.pop(tag, None)
        return live is not None and live.status == "failed"

    async def settle(self) -> None:
        """Wait until none is being written."""
        await asyncio.gather(*(live.done for live in self.all), return_exceptions=True)

    def _written(self, live: PendingSnapshot) -> None:
        if live.status == "ready":
            if self._live.get(live.tag) is live:
                del self._live[live.tag]
        else:
            log.warning("snapshot %s was not written: %s", live.tag, live.reason)
            self._events.tell("snapshot_failed", snapshot=live.tag, reason=live.reason)
