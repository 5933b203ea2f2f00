"""Branching: a running sandbox into a new snapshot; the sandbox goes on.

It stands still while its state is captured and its disk switched to a new overlay. Hashing,
dropping what did not change, packing and publishing follow once it runs again; a branch may return
before that (`begin`), and tell later what came of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ratoon.concurrency import uncancelled
from ratoon.engine.sandbox.capture import Buffers, Capture, capture, freeze, reserve, thaw
from ratoon.engine.sandbox.condense import squash_standby_layers
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.layer import Provenance, provenance_of, publish_layer
from ratoon.engine.sandbox.leaving import Leaving
from ratoon.engine.sandbox.memory_images import MemoryImages
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.engine.sandbox.stages import STANDING_STILL, Stages, sum_ms
from ratoon.engine.sandbox.standing import settle, stand_on, stand_on_itself
from ratoon.engine.sandbox.start import oserror_as_hosterror
from ratoon.errors import MachineError
from ratoon.store.disk.qcow2 import OverlayTemplates
from ratoon.store.memory.process import PageBuffer
from ratoon.store.snapshot.compact import publish_flat
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot, load_snapshot
from ratoon.store.snapshot.staging import Staging
from ratoon.store.snapshot.store import Store

log = logging.getLogger(__name__)

#: What is stored: the difference to what the sandbox stands on, or all of it, of depth 0.
Mode = Literal["diff", "full"]


@dataclass(frozen=True)
class Branched:
    """A new snapshot, and how long its making took, by stage, in ms.

    `difference_bytes`: what the memory takes that the sandbox's parent lacked; of a full branch
    too, which stores more.
    """

    snapshot: Snapshot
    stages: dict[str, float]
    captured_pages: int
    difference_bytes: int

    @property
    def pause_ms(self) -> float:
        """For how long the guest stood still."""
        return _pause_ms(self.stages)


@dataclass(frozen=True)
class PendingSnapshot:
    """A branch whose sandbox runs again, while the snapshot `tag` is being written."""

    tag: str
    pause_ms: float
    began_at_unix: float
    done: asyncio.Task[Branched]

    @property
    def status(self) -> Literal["writing", "ready", "failed"]:
        if not self.done.done():
            return "writing"
        return "failed" if self.done.cancelled() or self.done.exception() else "ready"

    @property
    def reason(self) -> str:
        """Why it failed."""
        return "it was interrupted" if self.done.cancelled() else str(self.done.exception())


@dataclass(frozen=True)
class _Frozen:
    """What a branch has when the sandbox runs again."""

    captured: Capture
    overlay: Path
    provenance: Provenance


#: Writes what is frozen as a snapshot, given its parent; that, and what the difference in memory
#: takes; blocks.
Write = Callable[[Staging, Snapshot, _Frozen, Stages], tuple[Snapshot, int]]
#: Has a sandbox, with this incarnation, stand on what was published.
StandOn = Callable[[Sandbox, Incarnation, Snapshot], None]


class Brancher:
    """Makes snapshots of running sandboxes."""

    def __init__(
        self,
        store: Store,
        memory_images: MemoryImages,
        leaving: Leaving,
        templates: OverlayTemplates,
        buffers: Buffers,
    ) -> None:
        self._store = store
        self._memory_images = memory_images
        self._leaving = leaving
        self._templates = templates
        self._buffers = buffers

    async def branch(
        self,
        sandbox: Sandbox,
        tag: str,
        *,
        mode: Mode = "diff",
        resumed: asyncio.Future[float] | None = None,
    ) -> Branched:
        """Publish the sandbox's present state as snapshot `tag`; the sandbox goes on.

        `resumed` gets the pause in ms as soon as the sandbox runs again. If it fails, the sandbox
        goes on as before and the store is as it was. AlreadyExists, InFlight; InvalidInput for a
        bad tag; Conflict in standby; HostError. Once it has begun it is not interrupted: if the
        caller is cancelled, there may be a snapshot afterwards.
        """
        provenance = provenance_of(sandbox)
        write = self._write_full if mode == "full" else self._write_diff
        with (
            oserror_as_hosterror(f"snapshot {tag} was not written"),
            self._store.stage(tag) as staging,
        ):
            async with sandbox.changing:
                run = sandbox.incarnation
                branched = await uncancelled(
                    self._branch(sandbox, run, staging, provenance, write, stand_on, resumed)
                )
        snapshot = branched.snapshot
        sandbox.note_branch(snapshot.memory_path(snapshot.depth))
        sandbox.events.tell("branched", sandbox=sandbox.id, snapshot=tag)
        return branched

    async def begin(self, sandbox: Sandbox, tag: str, *, mode: Mode) -> PendingSnapshot:
        """As `branch`, but returns as soon as the sandbox runs again."""
        resumed: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        began = time.time()
        done = asyncio.create_task(self.branch(sandbox, tag, mode=mode, resumed=resumed))
        try:
            await asyncio.wait((done, resumed), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            done.cancel()
            await asyncio.wait((done,))
            raise
        if not resumed.done():  # it failed before
            await done
        return PendingSnapshot(tag, resumed.result(), began, done)

    async def snapshot_for_fork(self, sandbox: Sandbox, directory: Path) -> Snapshot:
        """Link what the sandbox is at present as the new `directory`, for forks of it.

        One that runs goes on, and stands on what was taken; one in standby is that already.
        """
        with oserror_as_hosterror(f"sandbox {sandbox.id} was not forked"):
            async with sandbox.changing:
                if sandbox.state != "standby":
                    await uncancelled(self._branch_to_itself(sandbox, sandbox.incarnation))
                return link_snapshot(sandbox.parent, directory)

    async def _branch_to_itself(self, sandbox: Sandbox, run: Incarnation) -> None:
        """Have the sandbox stand on its present state, which is published to nobody else."""
        provenance = replace(provenance_of(sandbox), anonymous=True)
        await sandbox.spare.settle()  # it opens files by their names, which change
        settle(sandbox)
        before = sandbox.standing
        with sandbox.directory.stage() as staging:
            write = self._write_diff
            await self._branch(sandbox, run, staging, provenance, write, _stand_on_itself)
        await squash_standby_layers(sandbox)
        await self._leaving.leave(*before, keep=sandbox.standing)

    async def _branch(
        self,
        sandbox: Sandbox,
        run: Incarnation,
        staging: Staging,
        provenance: Provenance,
        write: Write,
        stand_on: StandOn,
        resumed: asyncio.Future[float] | None = None,
    ) -> Branched:
        if run.frozen:  # an undo that failed: what is below the overlay is in no layer
            await run.undo_branch()
        stages, left = Stages(), sandbox.standing
        with self._buffers.borrow() as buffer:
            try:
                frozen = await self._freeze_state(sandbox, run, buffer, provenance, stages)
                if resumed:
                    resumed.set_result(_pause_ms(stages.ms))
                snapshot, difference = await asyncio.to_thread(
                    write, staging, sandbox.parent, frozen, stages
                )
            except BaseException:
                if staging.published:  # too late: others may have come to rely on it
                    stand_on(sandbox, run, load_snapshot(staging.target))
                    await run.settle_disk()
                    await self._leave(left, sandbox)
                elif run.frozen:
                    with suppress(MachineError):  # tried again by the next branch
                        await run.undo_branch()
                raise
            pages = len(frozen.captured.numbers)
        stand_on(sandbox, run, snapshot)
        sandbox.persist()
        await run.settle_disk()
        await self._leave(left, sandbox)
        return Branched(snapshot, dict(stages.ms), pages, difference)

    async def _leave(self, left: tuple[Snapshot, ...], sandbox: Sandbox) -> None:
        """Remove what was made of what it stood on, and of that alone."""
        if sandbox.parent is sandbox.origin:
            await sandbox.spare.drop()  # it is of another origin, and may be having an image made
        await self._leaving.leave(*left, keep=sandbox.standing)
        sandbox.stock_spare()

    async def _freeze_state(
        self,
        sandbox: Sandbox,
        run: Incarnation,
        buffer: PageBuffer,
        provenance: Provenance,
        stages: Stages,
    ) -> _Frozen:
        """Take what makes the snapshot out of the sandbox, and let it run on with a new overlay.

        `run.frozen` is the old one then, also if it fails after the switch.
        """
        overlay = sandbox.directory.next_overlay()
        try:
            with stages("prepare"):
                self._templates.create(overlay, provenance.machine.disk_bytes)
                await run.machine.add_overlay(overlay)
                await reserve(run, buffer)
            with stages("quiesce"):
                still = await freeze(run)
            try:
                with stages("pause"):
                    await run.machine.pause()
                captured = await capture(run, buffer, stages)
                with stages("disk"):
                    await run.machine.switch_overlay()
                run.frozen, run.overlay = run.overlay, overlay
            finally:
                with stages("resume"):
                    await run.machine.resume()
                with stages("thaw"):
                    await thaw(sandbox.id, run)
        except BaseException:
            if run.overlay != overlay:
                with suppress(MachineError):
                    await run.machine.drop_overlay()
                overlay.unlink(missing_ok=True)
            raise
        assert run.frozen
        provenance = replace(provenance, warning=still.warning)
        return _Frozen(captured, run.frozen, provenance)

    def _write_diff(
        self, staging: Staging, parent: Snapshot, frozen: _Frozen, stages: Stages
    ) -> tuple[Snapshot, int]:
        snapshot = publish_layer(
            staging,
            self._memory_images,
            parent,
            frozen.captured,
            frozen.overlay,
            frozen.provenance,
            stages,
        )
        return snapshot, snapshot.manifest.layers[-1].memory.size

    def _write_full(
        self, staging: Staging, parent: Snapshot, frozen: _Frozen, stages: Stages
    ) -> tuple[Snapshot, int]:
        """All that the guest has, as one layer: first the difference, then what it lies on."""
        name = frozen.provenance.branched_from
        unnamed = replace(frozen, provenance=replace(frozen.provenance, anonymous=True))
        with self._store.scratch() as room:
            unfinished = room / "unfinished"
            unfinished.mkdir(mode=0o700)
            aside = Staging(unfinished, name, room / "diff")
            diff, size = self._write_diff(aside, parent, unnamed, stages)
            with stages("flatten"):
                return publish_flat(diff, staging, name, diff.manifest.stages), size


def _pause_ms(stages: Mapping[str, float]) -> float:
    return sum_ms(stages, STANDING_STILL) or 0.0


def _stand_on_itself(sandbox: Sandbox, run: Incarnation, snapshot: Snapshot) -> None:
    run.frozen = None
    stand_on_itself(sandbox, snapshot)
