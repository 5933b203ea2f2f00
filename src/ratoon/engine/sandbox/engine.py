"""The engine: boot, fork, branch, and the chains that come of it, as an async library.

::

    async with Engine.open() as engine:
        await engine.bases.from_image("debian", "base")
        async with await engine.fork_one("base") as sandbox:
            await sandbox.exec(["touch", "/root/made"])
            await engine.branch(sandbox, "made")

Sandboxes end with the engine, unless it is opened to keep them; snapshots stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

from ratoon import paths
from ratoon.artifacts import Progress, silent
from ratoon.concurrency import in_thread, uncancelled
from ratoon.engine.sandbox.adopt import adopt, lost
from ratoon.engine.sandbox.background_branches import BackgroundBranches
from ratoon.engine.sandbox.base import DISK_BYTES, RAM_BYTES, BaseBuilder, Built
from ratoon.engine.sandbox.branch import Branched, Brancher, Mode, PendingSnapshot
from ratoon.engine.sandbox.capture import Buffers
from ratoon.engine.sandbox.confinement import Confiner
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.disks import DiskChooser
from ratoon.engine.sandbox.events import Events
from ratoon.engine.sandbox.fork import Forker
from ratoon.engine.sandbox.keeper import keep_time
from ratoon.engine.sandbox.leaving import Leaving
from ratoon.engine.sandbox.memory_images import MemoryImages
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Owner, Sandbox
from ratoon.engine.sandbox.stages import Stages
from ratoon.engine.sandbox.standby import Lifecycle
from ratoon.engine.sandbox.start import MachineStarter, oserror_as_hosterror
from ratoon.engine.sandbox.sweep import sweep
from ratoon.errors import InvalidInput, NotFound, RatoonError
from ratoon.machine.host.admission import Admission
from ratoon.machine.host.cgroups import Cgroups
from ratoon.machine.host.figures import read_figures
from ratoon.machine.host.hierarchies import hierarchies
from ratoon.machine.network.namespaces import Namespaces
from ratoon.store.disk.qcow2 import OverlayTemplates
from ratoon.store.memory.image import ImageStore
from ratoon.store.snapshot.compact import compact
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store

__all__ = ["DISK_BYTES", "RAM_BYTES", "Built", "Engine"]


class Engine:
    """All that one process does with one store. Get it with `Engine.open`."""

    def __init__(
        self,
        store: Store,
        runtime: Path,
        namespaces: Namespaces,
        *,
        keep: bool,
    ) -> None:
        self.store = store
        #: What sandboxes have of the network.
        self.namespaces = namespaces
        #: Whether sandboxes outlive this engine.
        self.keep = keep
        #: What happens, for whoever listens.
        self.events = Events()
        self._sandboxes: dict[str, Sandbox] = {}
        self.images = ImageStore(store.images)
        self._memory_images = MemoryImages(self.images)
        self._disks = DiskChooser(store)
        self._leaving = Leaving(store, self._memory_images, self._disks)
        templates, buffers = OverlayTemplates(store.templates), Buffers()
        groups = hierarchies()
        # The runtime directory is the one name of a store that is short, and no other store's.
        confiner = Confiner(namespaces, Cgroups(runtime.name, groups))
        self._admission = Admission(partial(read_figures, store.home, groups))
        starter = MachineStarter(
            self._memory_images, self._disks, templates, confiner, survives=keep
        )
        self._brancher = Brancher(store, self._memory_images, self._leaving, templates, buffers)
        self._lifecycle = Lifecycle(self._memory_images, self._leaving, starter, buffers)
        self._owner = Owner(
            self.events, self._lifecycle.wake, self._forget, self._lifecycle.prepare
        )
        self._forker = Forker(store, starter, runtime, self._owner)
        self.pool = self._forker.pool
        #: Makes bases.
        self.bases = BaseBuilder(
            store, self.images, self._memory_images, buffers, confiner, runtime
        )
        self._live = BackgroundBranches(self.events)

    @classmethod
    @asynccontextmanager
    async def open(cls, home: Path | None = None, *, keep: bool = False) -> AsyncIterator[Engine]:
        """An engine on the store in `home` (default: where the environment says), cleaned up first.

        What a process that died has left is removed; what another one holds is not touched. On
        leaving, the sandboxes are killed, and snapshots and images being made are finished.

        `keep`: the sandboxes live on instead, also if this process is killed, and the next engine
        that keeps takes them over. There must be one such engine at a time: its caller sees to it.
        """
        store = Store.open(home or paths.home())
        runtime = paths.runtime(store.home)
        left = sweep(store, runtime, claim=keep)
        async with Namespaces(runtime) as namespaces:
            engine = cls(store, runtime, namespaces, keep=keep)
            engine.images.sweep()
            await engine._adopt(left)
            doze = engine._lifecycle.doze
            keeper = asyncio.create_task(
                keep_time(lambda: engine.sandboxes, kill=Sandbox.kill, suspend=doze)
            )
            try:
                yield engine
            finally:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)
                await engine.pool.close()
                if keep:
                    await engine._let_go()
                else:
                    await engine.kill_all()
                await engine.settle()
                with suppress(OSError):  # not there, or in use by another process
                    runtime.rmdir()

    # Snapshots ------------------------------------------------------------------------------------

    async def compact(self, tag: str, to: str, *, progress: Progress = silent) -> Snapshot:
        """Publish `to`, equal to snapshot `tag` but of depth 0; see `snapshot.compact`.

        Once it has begun it is not interrupted: if the caller is cancelled, there may be a snapshot
        afterwards.
        """
        made = await in_thread(compact, self.store, tag, to, progress)
        self.events.tell("snapshot_ready", snapshot=to)
        return made

    async def delete(
        self, tag: str, *, force: bool = False, cascade: bool = False
    ) -> tuple[str, ...]:
        """Delete a snapshot as `Store.delete` does; the deleted tags. Sandboxes are not affected.

        The images of the deleted go too, unless a remaining snapshot has the same memory. Of a live
        branch that failed there is no more than the failure to delete; InFlight while it writes.
        Once begun it is not interrupted.
        """

        async def delete() -> tuple[str, ...]:
            before = await asyncio.to_thread(store.image_roots)
            try:
                deleted = await asyncio.to_thread(store.delete, tag, force=force, cascade=cascade)
            finally:  # also of what an interrupted cascade has deleted
                await self._leaving.remove(before - await asyncio.to_thread(store.image_roots))
            for each in deleted:
                self.events.tell("snapshot_deleted", snapshot=each)
                await self.pool.drop(each)
            return deleted

        store, failed = self.store, self._live.forget(tag)
        try:
            return await uncancelled(delete())
        except NotFound:
            if failed:
                return (tag,)
            raise

    def evict_image(self, tag: str) -> None:
        """Remove a snapshot's image; its next fork is a first fork, and an image is made again."""
        manifest = self.store.get(tag).manifest
        self.images.remove(manifest.memory_root, manifest.disk_root)
        self._memory_images.forget(manifest.memory_root)

    # Forks ----------------------------------------------------------------------------------------

    @property
    def sandboxes(self) -> tuple[Sandbox, ...]:
        """The sandboxes of this engine that have not been killed."""
        return tuple(self._sandboxes.values())

    def get(self, sandbox_id: str) -> Sandbox:
        """The sandbox of this id; NotFound."""
        try:
            return self._sandboxes[sandbox_id]
        except KeyError:
            raise NotFound(f"no sandbox {sandbox_id}") from None

    async def fork_one(self, tag: str, options: SandboxOptions | None = None) -> Sandbox:
        """A sandbox forked from snapshot `tag`; its agent has answered. See `Forker.fork`."""
        source = self._forkable(tag)
        with self._admission.require_room(1):
            return await self._fork(source, options)

    async def fork(
        self, tag: str, n: int = 1, options: SandboxOptions | None = None
    ) -> list[Sandbox | RatoonError]:
        """`n` sandboxes forked from `tag`: for each, the sandbox or what went wrong with it.

        If it is cancelled, or fails as a whole, none of them is left. Overloaded: the host has no
        room for all of them; none was begun.
        """
        return await self._fork_many(self._forkable(tag), n, options)

    async def fork_sandbox(
        self, sandbox: Sandbox, n: int = 1, options: SandboxOptions | None = None
    ) -> list[Sandbox | RatoonError]:
        """As `fork`, from a sandbox as it is now: running, and it goes on, or in standby.

        Its forks have its options, unless others are given.
        """
        with self.store.scratch() as room:
            with sandbox.using():
                source = await self._brancher.snapshot_for_fork(sandbox, room / "source")
            try:
                return await self._fork_many(source, n, options or sandbox.options)
            finally:
                await self._memory_images.settle()
                await in_thread(self._remove_unused_image, source.manifest.memory_root)

    def _remove_unused_image(self, root: str) -> None:
        if root not in self.store.image_roots():
            self.images.remove(root)

    def _forkable(self, tag: str) -> Snapshot:
        self._live.require_written(tag)
        try:
            return self.store.get(tag)
        except NotFound:
            self._live.explain(tag)
            raise

    async def _fork_many(
        self, source: Snapshot, n: int, options: SandboxOptions | None
    ) -> list[Sandbox | RatoonError]:
        if n < 1:
            raise InvalidInput(f"cannot fork {n} times")

        async def attempt(ended: Callable[[], None]) -> Sandbox | RatoonError:
            try:
                return await self._fork(source, options)
            except RatoonError as error:
                return error
            finally:
                ended()

        tasks: list[asyncio.Task[Sandbox | RatoonError]] = []
        try:
            with self._admission.require_room(n) as ended:
                if n > 1:
                    try:
                        await self._forker.expect_many(source)
                    except RatoonError as error:
                        return [error] * n
                async with asyncio.TaskGroup() as group:
                    tasks += [group.create_task(attempt(ended)) for _ in range(n)]
        except BaseException:
            for task in tasks:
                if not task.cancelled() and not task.exception():
                    outcome = task.result()
                    if isinstance(outcome, Sandbox):
                        await outcome.kill()
            raise
        return [task.result() for task in tasks]

    async def _fork(self, source: Snapshot, options: SandboxOptions | None) -> Sandbox:
        sandbox = await self._forker.fork(source, options or SandboxOptions())
        self._sandboxes[sandbox.id] = sandbox
        try:
            if self.keep:
                with oserror_as_hosterror(f"sandbox {sandbox.id} was not forked"):
                    sandbox.keep()
        except BaseException:
            await sandbox.kill()
            raise
        sandbox.stock_spare()
        self.events.tell("created", sandbox=sandbox.id, snapshot=sandbox.record.forked_from)
        return sandbox

    async def _forget(self, sandbox: Sandbox) -> None:
        del self._sandboxes[sandbox.id]
        await self._leaving.leave(*sandbox.standing)

    async def _adopt(self, left: Iterable[SandboxDirectory]) -> None:
        """Take over the sandboxes of an engine that is gone."""
        for directory in left:
            try:
                sandbox = await adopt(self.store, self.namespaces, directory, self._owner)
            except RatoonError as error:
                lost(directory, error)
            else:
                self._sandboxes[sandbox.id] = sandbox
                sandbox.stock_spare()

    async def _let_go(self) -> None:
        await self._live.settle()
        await asyncio.gather(*(sandbox.let_go() for sandbox in self.sandboxes))
        await self.namespaces.let_go()

    # Branches -------------------------------------------------------------------------------------

    async def branch(self, sandbox: Sandbox, tag: str, mode: Mode = "diff") -> Branched:
        """Publish the state of a running sandbox as snapshot `tag`; it goes on running.

        `diff`: what changed since its last branch, or its fork; `full`: all of it, of depth 0.
        """
        async with sandbox.awake():  # also if it stands still: a branch lets it go on
            return await self._brancher.branch(sandbox, tag, mode=mode)

    async def begin_branch(
        self, sandbox: Sandbox, tag: str, mode: Mode = "diff"
    ) -> PendingSnapshot:
        """As `branch`, but returns when the sandbox runs again; `writing` tells what became of it.

        Until then the snapshot can be neither forked nor deleted (InFlight).
        """
        self._live.require_written(tag)
        async with sandbox.awake():
            live = await self._brancher.begin(sandbox, tag, mode=mode)
        self._live.add(live)
        return live

    @property
    def writing(self) -> tuple[PendingSnapshot, ...]:
        """The live branches whose snapshots are still being written, or that failed."""
        return self._live.all

    # Standby --------------------------------------------------------------------------------------

    async def standby(self, sandbox: Sandbox) -> Stages:
        """Put a sandbox to standby: its state is on disk, its memory free. See `Lifecycle`."""
        return await self._lifecycle.suspend(sandbox)

    async def resume(self, sandbox: Sandbox) -> Stages:
        """Let a sandbox in standby go on."""
        return await self._lifecycle.resume(sandbox)

    async def reset(self, sandbox: Sandbox) -> Stages:
        """Take a running sandbox back to its last branch, or to the snapshot it was forked from."""
        async with sandbox.awake():
            return await self._lifecycle.reset(sandbox)

    # The end --------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Wait until no snapshot and no image is being made in the background."""
        for each in (self._live, self._memory_images, self._disks):
            await each.settle()

    async def kill_all(self) -> None:
        """Kill every sandbox of this engine."""
        await asyncio.gather(*(sandbox.kill() for sandbox in self.sandboxes))
