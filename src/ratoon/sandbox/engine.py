"""The engine: boot, fork, branch, and the chains that come of it, as an async library.

::

    async with Engine.open() as engine:
        await engine.from_image("debian", "base")
        async with await engine.fork_one("base") as sandbox:
            await sandbox.exec(["touch", "/root/made"])
            await engine.branch(sandbox, "made")

Sandboxes end with the engine; snapshots stay.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ratoon import files, paths
from ratoon.artifacts import Progress, silent
from ratoon.concurrency import to_the_end
from ratoon.disk.qcow2 import OverlayTemplates
from ratoon.errors import CommandFailed, InvalidInput, NotFound, RatoonError
from ratoon.guest.build import Guest, build_guest
from ratoon.guest.channel import ExecResult
from ratoon.memory.digests import PAGE_SIZE
from ratoon.memory.image import ImageStore
from ratoon.sandbox.accelerator import choose_accelerator
from ratoon.sandbox.boot import boot, boot_from
from ratoon.sandbox.capture import Branched, Brancher
from ratoon.sandbox.fork import Forker
from ratoon.sandbox.heads import Heads, MappedMemory
from ratoon.sandbox.sandbox import STATE, Sandbox, SandboxDirectory
from ratoon.sandbox.stages import Stages
from ratoon.snapshot.compact import compact
from ratoon.snapshot.manifest import GuestInfo, MachineConfig
from ratoon.snapshot.snapshot import Snapshot
from ratoon.snapshot.store import Store
from ratoon.sources.debian import build_debian
from ratoon.vmm import command
from ratoon.vmm.driver import Accelerator, Hardware, Launch
from ratoon.vmm.qemu import qemu_version
from ratoon.vmm.tsc import host_tsc_khz

log = logging.getLogger(__name__)

MIB = 1024 * 1024
RAM_BYTES = 512 * MIB
DISK_BYTES = 8 * 1024 * MIB
EXEC_TIMEOUT = 600.0


@dataclass(frozen=True)
class Built:
    """A snapshot made by `from_image` or `snapshot_diff`: how its branch and all of it went.

    `stages` are those of the whole operation, in milliseconds; `branched.stages` are within its
    `branch`.
    """

    branched: Branched
    stages: dict[str, float]
    total_ms: float


class Engine:
    """All that one process does with one store. Get it with `Engine.open`."""

    def __init__(self, store: Store, runtime: Path, accelerators: frozenset[Accelerator]) -> None:
        self.store = store
        self._runtime = runtime
        self.images = ImageStore(store.images)
        self._heads = Heads(self.images)
        self._templates = OverlayTemplates(store.templates)
        self._forker = Forker(store, self._heads, self._templates, runtime, accelerators)
        self._brancher = Brancher(store, self._heads, self._templates)
        self._sandboxes: dict[str, Sandbox] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls, home: Path | None = None) -> AsyncIterator[Engine]:
        """An engine on the store in `home` (default: where the environment says), cleaned up first.

        What a process that died has left is removed; what another one holds is not touched. On
        leaving, the sandboxes are killed and images being made are finished.
        """
        store = Store.open(home or paths.home())
        runtime = paths.runtime(store.home)
        sweep(store, runtime)
        accelerators: set[Accelerator] = {"tcg"}
        if os.access("/dev/kvm", os.R_OK | os.W_OK):
            accelerators.add("kvm")
        engine = cls(store, runtime, frozenset(accelerators))
        engine.images.sweep()
        try:
            yield engine
        finally:
            await engine.kill_all()
            await engine.settle()
            with suppress(OSError):  # not there, or in use by another process
                runtime.rmdir()

    @property
    def sandboxes(self) -> tuple[Sandbox, ...]:
        """The sandboxes of this engine that have not been killed."""
        return tuple(self._sandboxes.values())

    async def from_image(
        self,
        image: str,
        tag: str,
        *,
        ram_bytes: int = RAM_BYTES,
        vcpus: int = 1,
        disk_bytes: int = DISK_BYTES,
        progress: Progress = silent,
    ) -> Built:
        """Boot `image` (`debian`) cold and publish it as the base snapshot `tag`."""
        self.store.require_free(tag)
        if image != "debian":
            raise NotFound(f"no image {image}; there is: debian")
        if ram_bytes < 128 * MIB or ram_bytes % PAGE_SIZE:
            raise InvalidInput(f"{ram_bytes} bytes of RAM: use 128 MiB or more, in whole pages")
        if not 1 <= vcpus <= 64:
            raise InvalidInput(f"{vcpus} virtual CPUs: use 1 to 64")
        stages = Stages()
        with stages("build"):
            guest = await asyncio.to_thread(build_guest, progress)
            disk = await asyncio.to_thread(build_debian, disk_bytes, progress)
            probe = await choose_accelerator(guest, progress)
        hardware = Hardware(ram_bytes, vcpus, probe.accelerator)
        progress(f"booting {image} with {ram_bytes // MIB} MiB of RAM on {probe.accelerator}")
        with stages("boot"):
            sandbox, agent_version = await self._boot(guest, disk, hardware)
        async with sandbox:
            with stages("branch"):
                progress(f"taking snapshot {tag}")
                info = GuestInfo(image=image, agent_version=agent_version)
                config = _config(hardware, guest, disk_bytes)
                branched = await self._brancher.branch(sandbox, tag, config, info)
        with stages("image"):
            await self._heads.make_image(branched.snapshot)
        return Built(branched, stages.ms, stages.total_ms)

    async def _boot(self, guest: Guest, disk: Path, hardware: Hardware) -> tuple[Sandbox, int]:
        """A cold-booted sandbox: a fork of all-zero RAM, given a kernel and no device state."""
        zero = await asyncio.to_thread(self.images.make, (), hardware.ram_bytes // PAGE_SIZE)
        memory = MappedMemory.of(zero)
        directory = SandboxDirectory.create(self.store.sandboxes, self.store.lock, self._runtime)
        try:
            overlay = directory.next_overlay()
            await asyncio.to_thread(files.copy_sparse, disk, overlay)
            launch = Launch(
                name=directory.id,
                hardware=hardware,
                memory=memory.path,
                disks=(),
                overlay=overlay,
                log=directory.log,
                runtime=directory.runtime,
                boot=boot_from(guest),
            )
            booted = await boot(launch)
        except BaseException:
            directory.remove()
            raise
        sandbox = Sandbox(directory, booted.machine, booted.channel, memory, None)
        try:
            directory.write_state(id=directory.id, snapshot=None, pid=sandbox.pid)
            await sandbox.rebirth()
        except BaseException:
            await sandbox.kill()
            raise
        return sandbox, booted.agent_version

    async def fork_one(self, tag: str) -> Sandbox:
        """A sandbox forked from snapshot `tag`; its agent has answered. See `Forker.fork`."""
        return await self._fork(tag, burst=False)

    async def fork(self, tag: str, n: int = 1) -> list[Sandbox | RatoonError]:
        """`n` sandboxes forked from `tag`: for each, the sandbox or what went wrong with it.

        If it is cancelled, or fails as a whole, none of them is left.
        """
        if n < 1:
            raise InvalidInput(f"cannot fork {n} times")

        async def attempt() -> Sandbox | RatoonError:
            try:
                return await self._fork(tag, burst=n > 1)
            except RatoonError as error:
                return error

        tasks: list[asyncio.Task[Sandbox | RatoonError]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks += [group.create_task(attempt()) for _ in range(n)]
        except BaseException:
            for task in tasks:
                if not task.cancelled() and not task.exception():
                    outcome = task.result()
                    if isinstance(outcome, Sandbox):
                        await outcome.kill()
            raise
        return [task.result() for task in tasks]

    async def _fork(self, tag: str, *, burst: bool) -> Sandbox:
        sandbox = await self._forker.fork(tag, burst=burst)
        self._sandboxes[sandbox.id] = sandbox
        sandbox.on_killed = self._forget
        return sandbox

    def _forget(self, sandbox: Sandbox) -> None:
        del self._sandboxes[sandbox.id]

    def get(self, sandbox_id: str) -> Sandbox:
        """The sandbox of this id; NotFound."""
        try:
            return self._sandboxes[sandbox_id]
        except KeyError:
            raise NotFound(f"no sandbox {sandbox_id}") from None

    async def branch(self, sandbox: Sandbox, tag: str) -> Branched:
        """Publish the state of a running sandbox as the diff snapshot `tag`; it goes on running."""
        parent = sandbox.parent
        assert parent is not None, "only a base's own boot has no parent"
        return await self._brancher.branch(
            sandbox, tag, parent.manifest.machine, parent.manifest.guest
        )

    async def snapshot_diff(
        self,
        parent: str,
        tag: str,
        argv: Sequence[str],
        *,
        timeout: float = EXEC_TIMEOUT,
        progress: Progress = silent,
    ) -> Built:
        """Fork `parent`, run `argv` in it, branch the result as `tag`, and delete the sandbox.

        CommandFailed: it did not exit with 0; then there is no snapshot.
        """
        self.store.require_free(tag)
        stages = Stages()
        progress(f"forking {parent}")
        with stages("fork"):
            sandbox = await self.fork_one(parent)
        async with sandbox:
            with stages("exec"):
                progress(f"running {' '.join(argv)[:60]}")
                result = await sandbox.exec(list(argv), timeout=timeout)
                if result.exit_code:
                    raise CommandFailed(f"snapshot {tag} was not made: {_explain(result)}")
            with stages("branch"):
                progress(f"taking snapshot {tag}")
                branched = await self.branch(sandbox, tag)
        return Built(branched, stages.ms, stages.total_ms)

    async def compact(self, tag: str, to: str, *, progress: Progress = silent) -> Snapshot:
        """Publish `to`, equal to snapshot `tag` but of depth 0; see `snapshot.compact`.

        Once it has begun it is not interrupted: if the caller is cancelled, there may be a snapshot
        afterwards.
        """
        return await to_the_end(asyncio.to_thread(compact, self.store, tag, to, progress))

    def delete(self, tag: str, *, force: bool = False, cascade: bool = False) -> tuple[str, ...]:
        """Delete a snapshot as `Store.delete` does; the deleted tags. Sandboxes are not affected.

        The images of the deleted go too, unless a remaining snapshot has the same memory.
        """
        before = self._memory_roots()
        try:
            return self.store.delete(tag, force=force, cascade=cascade)
        finally:  # also of what an interrupted cascade has deleted
            for root in before - self._memory_roots():
                self.images.remove(root)

    def _memory_roots(self) -> set[str]:
        entries = self.store.list()
        return {entry.manifest.memory_root for entry in entries if isinstance(entry, Snapshot)}

    def evict_image(self, tag: str) -> None:
        """Remove a snapshot's image; its next fork is a first fork, and an image is made again."""
        root = self.store.get(tag).manifest.memory_root
        self.images.remove(root)
        self._heads.forget(root)

    async def settle(self) -> None:
        """Wait until no image is being made in the background."""
        await self._heads.settle()

    async def kill_all(self) -> None:
        """Kill every sandbox of this engine."""
        await asyncio.gather(*(sandbox.kill() for sandbox in self.sandboxes))


def _explain(result: ExecResult) -> str:
    """How a command that failed ended, with the end of its stderr."""
    ended = "timed out" if result.timed_out else f"exited with {result.exit_code}"
    reason = result.error or result.stderr.decode(errors="replace").strip()[-2000:]
    return f"the command {ended}" + (f": {reason}" if reason else "")


def _config(hardware: Hardware, guest: Guest, disk_bytes: int) -> MachineConfig:
    return MachineConfig(
        ram_bytes=hardware.ram_bytes,
        vcpus=hardware.vcpus,
        cpu=command.cpu_model(hardware),
        accelerator=hardware.accelerator,
        qemu_version=qemu_version(),
        tsc_khz=host_tsc_khz(),
        kernel_digest=guest.kernel_digest,
        initramfs_digest=guest.initramfs_digest,
        disk_bytes=disk_bytes,
        devices=command.DEVICES,
    )


def sweep(store: Store, runtime: Path) -> None:
    """Remove sandboxes whose owner died; one that somebody holds is not touched.

    Their machines die with their owner; should one have survived, it is killed.
    """
    with files.locked(store.lock):
        for directory in store.sandboxes.iterdir():
            if not directory.is_dir():  # no sandbox; `ratoon check` tells of it
                continue
            lock = files.try_lock_directory(directory)
            if lock is None:
                continue
            _kill_leftover(directory)
            SandboxDirectory(directory, lock, runtime).remove()
            log.info("removed sandbox %s, whose owner died", directory.name)


def _kill_leftover(directory: Path) -> None:
    """Kill the recorded process, if it still is this sandbox's machine and not another's number."""
    with suppress(OSError, ValueError, KeyError):
        pid = int(json.loads((directory / STATE).read_text())["pid"])
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if directory.name.encode() in arguments:
            os.kill(pid, signal.SIGKILL)
