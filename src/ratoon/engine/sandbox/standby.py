"""Standby, resume and reset: a sandbox without a machine, and with another one.

In standby a sandbox is a snapshot of its own: its directory holds its memory, device state and
disk, and no process is left. A resume starts a machine on that. A reset starts one on the sandbox's
origin, whatever it stood on in between, and ends the machine that it replaces; one that was started
for that beforehand, a spare, needs no more than its device state.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import closing, suppress
from dataclasses import replace

from ratoon.concurrency import uncancelled
from ratoon.engine.sandbox.capture import Buffers, capture_last, freeze, reserve, thaw
from ratoon.engine.sandbox.condense import squash_standby_layers
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.layer import provenance_of, publish_layer
from ratoon.engine.sandbox.leaving import Leaving
from ratoon.engine.sandbox.memory_images import MemoryImages
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.engine.sandbox.stages import Stages
from ratoon.engine.sandbox.standing import go_back, origin_of, settle, stand_on_itself
from ratoon.engine.sandbox.start import MachineStarter, PreparedMachine, oserror_as_hosterror
from ratoon.errors import Conflict, HostError, MachineDied, MachineError
from ratoon.store.snapshot.snapshot import Snapshot

log = logging.getLogger(__name__)


class Lifecycle:
    """Takes machines away from sandboxes, and gives them new ones."""

    def __init__(
        self,
        memory_images: MemoryImages,
        leaving: Leaving,
        starter: MachineStarter,
        buffers: Buffers,
    ) -> None:
        self._memory_images = memory_images
        self._leaving = leaving
        self._starter = starter
        self._buffers = buffers

    async def suspend(self, sandbox: Sandbox) -> Stages:
        """Write the sandbox's state to its directory, and end its machine.

        Conflict: it is in standby already. If it fails, the sandbox goes on running. Once begun it
        is not interrupted.
        """
        stages = Stages()
        with oserror_as_hosterror(f"sandbox {sandbox.id} did not go to standby"):
            async with sandbox.changing:
                await uncancelled(self._suspend(sandbox, stages))
        return stages

    async def doze(self, sandbox: Sandbox) -> None:
        """As `suspend`, if it is idle still; whoever uses it from now on has it resumed."""
        async with sandbox.changing:
            if not sandbox.is_idle:
                return
            sandbox.wakes = True
            try:
                with sandbox.using():  # if it fails, it is tried again when it has idled once more
                    await uncancelled(self._suspend(sandbox, Stages()))
            finally:
                sandbox.wakes = sandbox.state == "standby"

    async def _suspend(self, sandbox: Sandbox, stages: Stages) -> None:
        run = sandbox.incarnation
        with stages("prepare"):
            settle(sandbox)
        parent = sandbox.parent
        with self._buffers.borrow() as buffer, sandbox.directory.stage() as staging:
            with stages("prepare"):
                if run.frozen:  # an undo that failed: what is below the overlay is in no layer
                    await run.undo_branch()
                await reserve(run, buffer)
            try:
                captured, still = await capture_last(run, buffer, stages)
                snapshot = await asyncio.to_thread(
                    publish_layer,
                    staging,
                    self._memory_images,
                    parent,
                    captured,
                    run.overlay,
                    replace(provenance_of(sandbox), warning=still.warning, anonymous=True),
                    stages,
                )
                sandbox.become(None)
                try:
                    stand_on_itself(sandbox, snapshot)
                except OSError:
                    sandbox.become(run)
                    raise
            except BaseException:
                with suppress(MachineError):
                    await run.machine.resume()
                await thaw(sandbox.id, run)
                raise
            with stages("end"):
                await sandbox.retire(run)
                await sandbox.spare.drop()
                await sandbox.directory.remove_cgroups()
                sandbox.directory.forget_overlays()
            with stages("condense"):
                await squash_standby_layers(sandbox)
                await self._leaving.leave(parent, keep=sandbox.standing)

    async def resume(self, sandbox: Sandbox) -> Stages:
        """Go on where `suspend` left off. Conflict: it is running.

        Incompatible, Corrupt, MachineDied …: it stays in standby, and nothing is lost.
        """
        stages = Stages()
        async with sandbox.changing:
            if sandbox.lost:
                raise sandbox.lost
            if sandbox.state != "standby":
                raise Conflict(f"sandbox {sandbox.id} is {sandbox.state}, not in standby")
            await self._resume(sandbox, stages)
        return stages

    async def wake(self, sandbox: Sandbox) -> None:
        """Resume a sandbox that dozes, or is about to."""
        async with sandbox.changing:
            if sandbox.wakes and sandbox.state == "standby":
                await self._resume(sandbox, Stages())

    async def _resume(self, sandbox: Sandbox, stages: Stages) -> None:
        try:
            await self._start(sandbox, sandbox.parent, stages, None)
        except BaseException:
            await sandbox.directory.remove_cgroups()
            raise
        sandbox.stock_spare()

    async def reset(self, sandbox: Sandbox) -> Stages:
        """Take the sandbox back to its origin: its last branch, or what it was forked from.

        Its id, machine-id and options stay; what it did since is gone, and its memory is given
        back. It goes on running as it is until the new machine has answered, and if that fails;
        with volumes to write to it stands still as the new one begins to run, which has the same.
        Conflict: there is no such state any more; see `origin_of`.
        """
        stages = Stages()
        async with sandbox.changing:
            before, left, origin = sandbox.incarnation, sandbox.parent, origin_of(sandbox)
            after = await self._start(sandbox, origin, stages, before)
            with stages("end"):  # too late to cancel it
                await uncancelled(self._end(sandbox, before, after, left))
        return stages

    async def _end(
        self, sandbox: Sandbox, before: Incarnation, after: Incarnation, left: Snapshot
    ) -> None:
        """Give back what a sandbox had before its reset."""
        try:
            await sandbox.retire(before)
        finally:
            go_back(sandbox)
            sandbox.persist()
            sandbox.directory.forget_overlays(after.overlay)
            sandbox.stock_spare()
            await self._leaving.leave(left, keep=sandbox.standing)

    async def _start(
        self, sandbox: Sandbox, source: Snapshot, stages: Stages, before: Incarnation | None
    ) -> Incarnation:
        """Have the sandbox go on with a new machine, on `source`, in the place of `before` if any.

        If this fails, nothing has changed.
        """
        try:
            run = await self._wake_spare(sandbox, source, stages, before)
            if run is None:
                prepared = await self.prepare(sandbox, source, stages)
                run = await self._wake(sandbox, prepared, stages, before)
            left, sandbox.parent = sandbox.parent, source
            try:
                with oserror_as_hosterror(f"sandbox {sandbox.id} was not started"):
                    sandbox.become(run)
            except HostError:
                sandbox.parent = left
                await run.end()
                run.overlay.unlink()
                raise
        except BaseException:
            if before and before.still:
                await thaw(sandbox.id, before)
            raise
        return run

    async def _wake(
        self,
        sandbox: Sandbox,
        prepared: PreparedMachine,
        stages: Stages,
        before: Incarnation | None,
    ) -> Incarnation:
        async def hand_over() -> None:
            if before and before.writes_volumes and not before.still:
                with stages("quiesce"):
                    await freeze(before)

        return await self._starter.wake(
            sandbox.id,
            sandbox.machine_id,
            prepared,
            stages,
            sandbox.mounts,
            sandbox.options,
            resume=before is None,
            hand_over=hand_over,
        )

    async def _wake_spare(
        self, sandbox: Sandbox, source: Snapshot, stages: Stages, before: Incarnation | None
    ) -> Incarnation | None:
        prepared = await sandbox.spare.take(source.manifest.id)
        if prepared is None:
            return None
        try:
            return await self._wake(sandbox, prepared, stages, before)
        except MachineDied:  # as it waited, most likely
            log.warning("the spare machine of sandbox %s had died", sandbox.id)
            return None

    async def prepare(
        self, sandbox: Sandbox, source: Snapshot, stages: Stages | None = None
    ) -> PreparedMachine:
        """A machine of the sandbox that waits for the device state of `source`."""
        stages = stages or Stages()
        with oserror_as_hosterror(f"sandbox {sandbox.id} was not started"):
            verified = await self._starter.verify(source, stages)
            with closing(verified.disk):
                return await self._starter.prepare(
                    sandbox.directory, source, verified, sandbox.options, stages
                )
