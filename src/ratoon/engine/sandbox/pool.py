"""Machines started ahead, which have rehearsed: a fork is no more than another rebirth.

For each tag that is pooled, so many wait. One costs the memory of a QEMU whose guest has run for a
moment, and holds an id; `Pool.status` says how much.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from ratoon.api.answers import PoolInfo
from ratoon.concurrency import uncancelled
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.start import PreparedMachine
from ratoon.errors import InvalidInput, RatoonError
from ratoon.machine.host.usage import usage
from ratoon.store.snapshot.snapshot import Snapshot

log = logging.getLogger(__name__)

LARGEST = 1000


@dataclass(frozen=True)
class PooledMachine:
    """A machine that waits in the directory of a sandbox that is to be."""

    directory: SandboxDirectory
    twin: Snapshot
    prepared: PreparedMachine

    async def discard(self) -> None:
        await self.prepared.discard()
        await self.directory.delete()


@dataclass
class _Stock:
    snapshot: Snapshot
    wanted: int
    ready: deque[PooledMachine] = field(default_factory=deque)
    filling: asyncio.Task[None] | None = None


class Pool:
    """Keeps machines in stock. `reserve` starts one."""

    def __init__(self, reserve: Callable[[Snapshot], Awaitable[PooledMachine]]) -> None:
        self._stocks: dict[str, _Stock] = {}
        self._reserve = reserve

    async def keep(self, snapshot: Snapshot, wanted: int) -> None:
        """Have `wanted` machines of a snapshot wait, from soon on; 0: none any more."""
        if not 0 <= wanted <= LARGEST:
            raise InvalidInput(f"a pool of {wanted} machines: use 0 to {LARGEST}")
        tag = snapshot.manifest.tag
        while tag in self._stocks:  # another may ask for the same meanwhile
            await self.drop(tag)
        if wanted:
            self._stocks[tag] = stock = _Stock(snapshot, wanted)
            self._fill(stock)

    async def drop(self, tag: str) -> None:
        """Keep no machines of `tag` any more. Once begun it is not interrupted."""
        if stock := self._stocks.pop(tag, None):
            await uncancelled(self._empty(stock))

    async def _empty(self, stock: _Stock) -> None:
        stock.wanted = 0
        if stock.filling:
            stock.filling.cancel()
            await asyncio.gather(stock.filling, return_exceptions=True)
        while stock.ready:
            await stock.ready.popleft().discard()

    async def take(self, snapshot: Snapshot) -> PooledMachine | None:
        """A machine of just this snapshot, if one waits; another one is started in its place."""
        stock = self._stocks.get(snapshot.manifest.tag)
        if stock is None or stock.snapshot.manifest.id != snapshot.manifest.id:
            return None
        try:
            while stock.ready:
                taken = stock.ready.popleft()
                if not taken.prepared.machine.has_died:
                    return taken
                await taken.discard()
            return None
        finally:
            self._fill(stock)

    def status(self) -> tuple[PoolInfo, ...]:
        return tuple(
            PoolInfo(
                tag,
                stock.wanted,
                sum(not each.prepared.machine.has_died for each in stock.ready),
                sum(_private_bytes(each) for each in stock.ready),
            )
            for tag, stock in self._stocks.items()
        )

    async def filled(self) -> None:
        """Wait until each stock is as large as it should be, or could not be filled."""
        while tasks := [stock.filling for stock in self._stocks.values() if stock.filling]:
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Kill all that waits."""
        for tag in tuple(self._stocks):
            await self.drop(tag)

    def _fill(self, stock: _Stock) -> None:
        if stock.filling is None and len(stock.ready) < stock.wanted:
            stock.filling = asyncio.create_task(self._fill_up(stock))

    async def _fill_up(self, stock: _Stock) -> None:
        try:
            while len(stock.ready) < stock.wanted:
                stock.ready.append(await self._reserve(stock.snapshot))
        except RatoonError as error:  # tried again when one is taken
            log.warning("the pool of %s is not full: %s", stock.snapshot.manifest.tag, error)
        finally:
            stock.filling = None


def _private_bytes(reserved: PooledMachine) -> int:
    used = usage(reserved.prepared.machine.pid, reserved.prepared.overlay)
    return used.memory_bytes if used else 0
