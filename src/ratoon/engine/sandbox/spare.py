"""The spare machine of a sandbox: started ahead, so that its next reset need only wake it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from ratoon.engine.sandbox.start import PreparedMachine
from ratoon.errors import RatoonError

log = logging.getLogger(__name__)


class Spare:
    """One machine that is being started, or waits, or none."""

    def __init__(self, sandbox_id: str) -> None:
        self._id = sandbox_id
        self._starting: asyncio.Task[PreparedMachine] | None = None

    def stock(self, start: Callable[[], Coroutine[Any, Any, PreparedMachine]]) -> None:
        """Have a machine started, where there is none."""
        if self._starting is None:
            self._starting = asyncio.create_task(start())

    async def settle(self) -> None:
        """Wait until it is started, or has failed."""
        if self._starting:
            await asyncio.wait((self._starting,))

    async def take(self, snapshot_id: str) -> PreparedMachine | None:
        """The machine, if it stands on that snapshot and is alive; there is none afterwards."""
        if self._starting is None:
            return None
        await self.settle()  # whoever is cancelled meanwhile leaves it here
        starting, self._starting = self._starting, None
        try:
            prepared = starting.result()
        except RatoonError as error:
            log.warning("sandbox %s has no spare machine: %s", self._id, error)
            return None
        if prepared.snapshot_id == snapshot_id and not prepared.machine.has_died:
            return prepared
        await prepared.discard()
        return None

    async def drop(self) -> None:
        """End the machine."""
        if self._starting is None:
            return
        self._starting.cancel()
        await asyncio.wait((self._starting,))
        starting, self._starting = self._starting, None
        if not starting.cancelled() and not starting.exception():
            await starting.result().discard()
