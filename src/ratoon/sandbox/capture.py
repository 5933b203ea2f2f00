"""Branching: a running sandbox into a new snapshot, while it stands still for as short as can be.

Paused, only what cannot wait is done: device state, the list of changed pages, their copy, and the
switch to a new disk overlay. Hashing, dropping what did not change, packing and publishing follow
once the sandbox runs again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ratoon.concurrency import to_the_end
from ratoon.disk.qcow2 import OverlayTemplates, disk_root, file_digest
from ratoon.errors import GuestError, MachineError
from ratoon.memory.chain import overlay
from ratoon.memory.digests import PAGE_SIZE, memory_root, select_changed, zero_array
from ratoon.memory.dirty import dirty_pages
from ratoon.memory.pageset import write_page_set
from ratoon.memory.process import PageBuffer, read_into
from ratoon.sandbox.heads import Heads
from ratoon.sandbox.sandbox import Sandbox
from ratoon.sandbox.stages import Stages
from ratoon.snapshot.manifest import (
    FileRef,
    GuestInfo,
    LayerRef,
    MachineConfig,
    Manifest,
    MemoryFile,
    ParentRef,
)
from ratoon.snapshot.snapshot import DISK, MEMORY, VMSTATE, Snapshot
from ratoon.snapshot.staging import Staging
from ratoon.snapshot.store import Store

log = logging.getLogger(__name__)

#: Seconds the guest may take to stop its processes before it is branched all the same.
FREEZE_TIMEOUT = 2.0
#: Pages that may become dirty between the first look and the pause without costing it faults.
SPARE_PAGES = 1024


@dataclass(frozen=True)
class Capture:
    """What was taken from a paused machine; `pages` (n, 4096) lie in a borrowed buffer."""

    state: bytes
    numbers: NDArray[np.uint64]
    pages: NDArray[np.uint8]
    pause_ms: float
    warning: str | None


@dataclass(frozen=True)
class Branched:
    """A new snapshot, and how long its making took, by stage and for the guest, in ms."""

    snapshot: Snapshot
    stages: dict[str, float]
    pause_ms: float
    captured_pages: int


class Buffers:
    """Page buffers to borrow; one that has grown is worth keeping."""

    def __init__(self) -> None:
        self._free: list[PageBuffer] = []

    @contextmanager
    def borrow(self) -> Iterator[PageBuffer]:
        buffer = self._free.pop() if self._free else PageBuffer()
        try:
            yield buffer
        finally:
            self._free.append(buffer)


class Brancher:
    """Makes snapshots of running sandboxes."""

    def __init__(self, store: Store, heads: Heads, templates: OverlayTemplates) -> None:
        self._store = store
        self._heads = heads
        self._templates = templates
        self._buffers = Buffers()

    async def branch(
        self, sandbox: Sandbox, tag: str, machine: MachineConfig, guest: GuestInfo
    ) -> Branched:
        """Publish the sandbox's present state as snapshot `tag`; the sandbox goes on.

        Of a sandbox without a parent this makes a base. If it fails, the sandbox goes on as before
        and the store is as it was. AlreadyExists, InFlight; InvalidInput for a bad tag. Once it has
        begun it is not interrupted: if the caller is cancelled, there may be a snapshot afterwards.
        """
        with self._store.stage(tag) as staging, self._buffers.borrow() as buffer:
            async with sandbox.changing:
                return await to_the_end(self._branch(sandbox, staging, buffer, machine, guest))

    async def _branch(
        self,
        sandbox: Sandbox,
        staging: Staging,
        buffer: PageBuffer,
        machine: MachineConfig,
        guest: GuestInfo,
    ) -> Branched:
        stages = Stages()
        if sandbox.frozen:  # an undo that failed: what is below the overlay is in no layer
            await _undo(sandbox)
        try:
            capture = await self._capture(sandbox, buffer, machine.disk_bytes, stages)
            assert sandbox.frozen
            snapshot = await asyncio.to_thread(
                self._publish,
                staging,
                sandbox.parent,
                sandbox.frozen,
                capture,
                machine,
                guest,
                stages,
            )
        except BaseException:
            if staging.published:  # too late: others may have come to rely on it
                self._stand_on(sandbox, self._store.get(staging.tag))
            elif sandbox.frozen:
                with suppress(MachineError):  # tried again by the next branch
                    await _undo(sandbox)
            raise
        self._stand_on(sandbox, snapshot)
        return Branched(snapshot, dict(stages.ms), capture.pause_ms, len(capture.numbers))

    def _stand_on(self, sandbox: Sandbox, snapshot: Snapshot) -> None:
        sandbox.frozen = None
        sandbox.parent = snapshot
        try:
            sandbox.parent = sandbox.directory.stand_on(snapshot)
        except OSError as error:
            log.warning(
                "sandbox %s cannot link the layers of %s (%s): do not delete that snapshot "
                "before the sandbox",
                *(sandbox.id, snapshot.manifest.tag, error.strerror),
            )

    async def _capture(
        self, sandbox: Sandbox, buffer: PageBuffer, disk_bytes: int, stages: Stages
    ) -> Capture:
        """Take what makes the snapshot out of the sandbox, and let it run on with a new overlay.

        `sandbox.frozen` is the old one then, also if it fails after the switch.
        """
        machine, ram = sandbox.machine, sandbox.memory
        address = ram.address_in(machine.pid)
        overlay = sandbox.directory.next_overlay()
        try:
            with stages("prepare"):
                self._templates.create(overlay, disk_bytes)
                await machine.add_overlay(overlay)
                # Room for the pages is touched before the pause: that costs more than the copy.
                expected = await asyncio.to_thread(dirty_pages, machine.pid, address, ram.length)
                await asyncio.to_thread(buffer.reserve, len(expected) + SPARE_PAGES)
            with stages("quiesce"):
                warning = await self._freeze(sandbox)
            began = time.perf_counter()
            try:
                with stages("pause"):
                    await machine.pause()
                with stages("state"):
                    state = await machine.save_state()
                with stages("scan"):
                    numbers = await asyncio.to_thread(dirty_pages, machine.pid, address, ram.length)
                with stages("copy"):
                    pages = buffer.view(len(numbers))
                    await asyncio.to_thread(read_into, machine.pid, address, numbers, pages)
                with stages("disk"):
                    await machine.switch_overlay()
                sandbox.frozen, sandbox.overlay = sandbox.overlay, overlay
            finally:
                with stages("resume"):
                    await machine.resume()
                pause_ms = (time.perf_counter() - began) * 1e3
                with stages("thaw"):
                    await self._thaw(sandbox)
        except BaseException:
            if sandbox.overlay != overlay:
                with suppress(MachineError):
                    await machine.drop_overlay()
                overlay.unlink(missing_ok=True)
            raise
        return Capture(state, numbers, pages, round(pause_ms, 3), warning)

    async def _freeze(self, sandbox: Sandbox) -> str | None:
        """Stop the sandbox's processes, so that none runs in a fork before it is reborn."""
        try:
            reply = await sandbox.channel.request(
                "freeze", timeout=FREEZE_TIMEOUT + 1, seconds=FREEZE_TIMEOUT
            )
        except GuestError as error:
            problem = str(error)
        else:
            if reply.get("frozen") is True:
                return None
            problem = f"they did not stop within {FREEZE_TIMEOUT:g} s"
        return f"the guest's processes were running when it was branched: {problem}"

    async def _thaw(self, sandbox: Sandbox) -> None:
        try:
            await sandbox.channel.request("thaw", timeout=FREEZE_TIMEOUT + 1)
        except GuestError as error:  # nothing is lost: the next branch or rebirth thaws as well
            log.warning("sandbox %s: %s", sandbox.id, error)

    def _publish(
        self,
        staging: Staging,
        parent: Snapshot | None,
        frozen: Path,
        capture: Capture,
        machine: MachineConfig,
        guest: GuestInfo,
        stages: Stages,
    ) -> Snapshot:
        """Hash, drop what the parent has, pack and publish; blocks, while the sandbox runs."""
        with stages("pack"):
            ram_pages = machine.ram_bytes // PAGE_SIZE
            below = self._heads.array(parent) if parent else zero_array(ram_pages)
            changed, digests, rows = select_changed(capture.numbers, capture.pages, below)
            path = staging.path / MEMORY
            index = write_page_set(path, ram_pages, changed, digests, capture.pages, rows)
            array = overlay(below, index)
            root = memory_root(array)
            (staging.path / VMSTATE).write_bytes(capture.state)
            os.link(frozen, staging.path / DISK)
            if parent:
                staging.adopt_ancestry(parent)
        with stages("digest"):
            identity = uuid.uuid4().hex
            disk = FileRef(digest=file_digest(frozen), size=frozen.stat().st_size)
            memory = MemoryFile(
                index_digest=index.index_digest,
                entries=len(index.numbers),
                stored=index.stored,
                size=path.stat().st_size,
            )
            own = LayerRef(tag=staging.tag, id=identity, memory_root=root, memory=memory, disk=disk)
            layers = (*(parent.manifest.layers if parent else ()), own)
            manifest = Manifest(
                tag=staging.tag,
                id=identity,
                created_at_unix=time.time(),
                parent=_reference(parent) if parent else None,
                memory_root=root,
                disk_root=disk_root([layer.disk.digest for layer in layers]),
                machine=machine,
                vmstate=FileRef(digest=blake3(capture.state).hexdigest(), size=len(capture.state)),
                layers=layers,
                guest=guest,
                stages=dict(stages.ms),
                warning=capture.warning,
            )
        with stages("publish"):
            snapshot = staging.publish(manifest)
        self._heads.remember(root, array)
        return snapshot


async def _undo(sandbox: Sandbox) -> None:
    """Put the sandbox back on the overlay that a branch has frozen, with what was written since."""
    await sandbox.machine.undo_overlay()
    assert sandbox.frozen
    sandbox.overlay.unlink()
    sandbox.overlay, sandbox.frozen = sandbox.frozen, None


def _reference(parent: Snapshot) -> ParentRef:
    manifest = parent.manifest
    return ParentRef(tag=manifest.tag, id=manifest.id, memory_root=manifest.memory_root)
