"""Forking: a snapshot into a running sandbox whose agent has answered."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path

from ratoon.concurrency import uncancelled
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.mounts import Mounts
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.pool import Pool, PooledMachine
from ratoon.engine.sandbox.record import new_machine_id, new_record
from ratoon.engine.sandbox.sandbox import Owner, Sandbox
from ratoon.engine.sandbox.stages import Stages
from ratoon.engine.sandbox.start import MachineStarter, oserror_as_hosterror
from ratoon.errors import MachineDied
from ratoon.machine.network.policy import NetworkPolicy
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store

log = logging.getLogger(__name__)

#: Starts under way at a time. More of them only make each other wait.
CONCURRENT_STARTS = 2 * (os.cpu_count() or 1)


class Forker:
    """Starts sandboxes from snapshots."""

    def __init__(
        self,
        store: Store,
        starter: MachineStarter,
        runtime: Path,
        owner: Owner,
    ) -> None:
        self._store = store
        self._starter = starter
        self._runtime = runtime
        self._owner = owner
        self._starts = asyncio.Semaphore(CONCURRENT_STARTS)
        #: Machines that were started ahead, which it takes first.
        self.pool = Pool(self.reserve)

    async def expect_many(self, source: Snapshot) -> None:
        """Have what many forks of `source`, which come next, share. Errors: as `fork`."""
        with oserror_as_hosterror(f"snapshot {source.manifest.tag} was not forked"):
            await self._starter.expect_many(source)

    async def fork(self, source: Snapshot, options: SandboxOptions) -> Sandbox:
        """A sandbox forked from `source`, whose agent has answered.

        Corrupt naming the snapshot and the file or page that is damaged; NotFound if it was deleted
        meanwhile; Incompatible with this host's QEMU; MachineDied; HostError if a file cannot be
        made: the disk is full. A fork that fails leaves nothing behind.
        """
        default = NetworkPolicy.parse(source.manifest.network)
        options = options.model_copy(update={"network": options.network or default})
        async with self._starts:
            stages = Stages()
            with oserror_as_hosterror(f"snapshot {source.manifest.tag} was not forked"):
                while options.network == default and (waiting := await self.pool.take(source)):
                    try:
                        with stages("limit"):
                            await self._limit(waiting, options)
                        return await self._wake(waiting, options, stages)
                    except MachineDied:  # as it waited, most likely
                        log.warning("a machine of the pool had died: %s", waiting.directory.id)
                reserved = await self._reserve(source, options, stages)
                return await self._wake(reserved, options, stages)

    async def reserve(self, source: Snapshot) -> PooledMachine:
        """A machine that waits, started and, if it can, rehearsed. Errors: as `fork`.

        What a guest has yet to write to volumes would be lost by a rehearsal, so it is not to run.
        """
        options = SandboxOptions(network=NetworkPolicy.parse(source.manifest.network))
        await self.expect_many(source)
        async with self._starts:
            with oserror_as_hosterror(f"snapshot {source.manifest.tag} was not forked"):
                reserved = await self._reserve(source, options, Stages())
                if reserved.prepared.warned or await self._rehearsed(reserved):
                    return reserved
                return await self._reserve(source, options, Stages())

    async def _rehearsed(self, reserved: PooledMachine) -> bool:
        """Whether it has rehearsed; else it is gone."""
        rehearsed = False
        try:
            rehearsed = await self._starter.rehearse(reserved.directory.id, reserved.prepared)
        finally:
            if not rehearsed:
                await reserved.discard()
        return rehearsed

    async def _limit(self, reserved: PooledMachine, options: SandboxOptions) -> None:
        try:
            await self._starter.limit(reserved.directory, reserved.prepared, options.limits)
        except BaseException:
            await reserved.discard()
            raise

    async def _reserve(
        self, source: Snapshot, options: SandboxOptions, stages: Stages
    ) -> PooledMachine:
        with stages("resolve"):
            directory = SandboxDirectory.create(
                self._store.sandboxes, self._store.lock, self._runtime
            )
        try:
            with source.noticing_deletion():
                verified = await self._starter.verify(source, stages)
            with closing(verified.disk):
                twin = directory.twin_of(source)
                async with _standing(directory, source) as stands:
                    prepared = await self._starter.prepare(
                        directory,
                        twin,
                        verified,
                        options,
                        stages,
                        stands=stands,
                        published=source,
                    )
        except BaseException:
            await directory.delete()
            raise
        return PooledMachine(directory, twin, prepared)

    async def _wake(
        self, reserved: PooledMachine, options: SandboxOptions, stages: Stages
    ) -> Sandbox:
        directory = reserved.directory
        machine_id = new_machine_id()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(reserved.discard)
            mounts = await asyncio.to_thread(
                Mounts.hold, self._store.home, directory.id, options.volumes
            )
            undo.callback(mounts.let_go)
            incarnation = await self._starter.wake(
                directory.id, machine_id, reserved.prepared, stages, mounts, options
            )
            undo.pop_all()
        twin = reserved.twin
        return Sandbox(
            directory,
            incarnation,
            new_record(directory.id, machine_id, options, twin),
            self._owner,
            parent=twin,
            origin=twin,
            mounts=mounts,
            stages=stages,
        )


@asynccontextmanager
async def _standing(
    directory: SandboxDirectory, source: Snapshot
) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    """Have the sandbox stand on `source`, and give what waits for that; it ends with the block.

    Each layer is a directory and two links: of a deep chain they are made while QEMU starts.
    Errors: as `SandboxDirectory.stand_on`.
    """
    linking = asyncio.create_task(asyncio.to_thread(directory.stand_on, source))

    async def stands() -> None:
        await asyncio.wait((linking,))
        linking.result()

    try:
        yield stands
    finally:
        with suppress(Exception):  # raised by `stands`, unless something else was before
            await uncancelled(linking)
