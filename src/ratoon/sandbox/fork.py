"""Forking: a snapshot into a running sandbox whose agent has answered."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

from ratoon import files
from ratoon.disk.qcow2 import OverlayTemplates
from ratoon.errors import Corrupt, HostError, Incompatible
from ratoon.guest.agent import wire
from ratoon.guest.channel import Channel
from ratoon.sandbox.deaths import blamed
from ratoon.sandbox.heads import Heads, MappedMemory, Pages, Patch, write_patch
from ratoon.sandbox.sandbox import Sandbox, SandboxDirectory
from ratoon.sandbox.stages import Stages
from ratoon.snapshot.snapshot import Snapshot, read_vmstate
from ratoon.snapshot.store import Store
from ratoon.snapshot.verify import verify_disks
from ratoon.vmm import command
from ratoon.vmm.driver import Accelerator, Hardware, Launch
from ratoon.vmm.qemu import QemuMachine, qemu_version
from ratoon.vmm.tsc import host_tsc_khz, same_rate

#: Starts under way at a time. More of them only make each other wait.
CONCURRENT_STARTS = 2 * (os.cpu_count() or 1)


class Forker:
    """Starts sandboxes from snapshots."""

    def __init__(
        self,
        store: Store,
        heads: Heads,
        templates: OverlayTemplates,
        runtime: Path,
        accelerators: frozenset[Accelerator],
    ) -> None:
        self._store = store
        self._heads = heads
        self._templates = templates
        self._runtime = runtime
        self._accelerators = accelerators
        self._starts = asyncio.Semaphore(CONCURRENT_STARTS)

    async def fork(self, tag: str, *, burst: bool = False) -> Sandbox:
        """A sandbox forked from snapshot `tag`; `burst`: one of many that are forked together.

        NotFound; Corrupt naming the snapshot and the file or page that is damaged; Incompatible
        with this host's QEMU; MachineDied; HostError if a file cannot be made: the disk is full. A
        fork that fails leaves nothing behind.
        """
        async with self._starts:
            stages = Stages()
            with stages("resolve"):
                snapshot = self._store.get(tag)
                check_compatible(snapshot, self._accelerators)
                directory = SandboxDirectory.create(
                    self._store.sandboxes, self._store.lock, self._runtime
                )
            try:
                return await self._start(directory, snapshot, burst, stages)
            except BaseException as error:
                directory.remove()
                if isinstance(error, OSError):
                    reason = files.describe(error)
                    raise HostError(f"snapshot {tag} was not forked: {reason}") from error
                raise

    async def _start(
        self, directory: SandboxDirectory, snapshot: Snapshot, burst: bool, stages: Stages
    ) -> Sandbox:
        try:
            with stages("verify"):
                await asyncio.to_thread(verify_disks, snapshot)
                state = read_vmstate(snapshot)
            with stages("resolve"):
                twin = directory.stand_on(snapshot)
        except Corrupt:
            self._store.get(snapshot.manifest.tag)  # NotFound, if it was deleted meanwhile
            raise
        with stages("image"):
            image, patch = await self._heads.choose(twin, snapshot, burst=burst)
        with image:
            memory = MappedMemory.of_image(image)
            config = twin.manifest.machine
            with stages("overlay"):
                overlay = directory.next_overlay()
                self._templates.create(overlay, config.disk_bytes)
            launch = Launch(
                name=directory.id,
                hardware=Hardware(config.ram_bytes, config.vcpus, config.accelerator),
                # By descriptor: QEMU makes a new file, all zeros, where the name is gone.
                memory=Path(f"/proc/self/fd/{image.fd}"),
                disks=tuple(twin.disk_path(number) for number in range(twin.depth + 1)),
                overlay=overlay,
                log=directory.log,
                runtime=directory.runtime,
                descriptors=(image.fd,),
            )
            machine, pages = await self._start_machine(launch, patch, stages)
        channel = None
        try:
            directory.write_state(id=directory.id, snapshot=twin.manifest.tag, pid=machine.pid)
            if pages:
                with stages("image"):
                    await asyncio.to_thread(write_patch, machine.pid, memory, pages)
            with stages("load"):
                async with blamed(machine, f"sandbox {directory.id} died (process {machine.pid})"):
                    channel = await Channel.connect(machine.agent_socket, directory.id)
                await machine.load_state(state)
            with stages("resume"):
                await machine.resume()
            with stages("rebirth"):
                sandbox = Sandbox(directory, machine, channel, memory, twin)
                await sandbox.rebirth()
            sandbox.stages, sandbox.fork_ms = dict(stages.ms), stages.total_ms
            return sandbox
        except BaseException:
            if channel:
                channel.close()
            await machine.kill()
            raise

    async def _start_machine(
        self, launch: Launch, patch: Patch | None, stages: Stages
    ) -> tuple[QemuMachine, list[Pages]]:
        """Start the machine and, meanwhile, read and check the pages to be written into it."""
        if patch is None:
            with stages("start"):
                return await QemuMachine.start(launch), []
        reading = asyncio.create_task(asyncio.to_thread(self._heads.read_patch, patch))
        try:
            with stages("start"):
                machine = await QemuMachine.start(launch)
        except BaseException:
            with suppress(Exception):
                await reading
            raise
        try:
            with stages("image"):
                return machine, await reading
        except BaseException:
            await machine.kill()
            raise


def check_compatible(snapshot: Snapshot, accelerators: frozenset[Accelerator]) -> None:
    """Incompatible unless this host can load the snapshot's device state; names both sides."""
    config = snapshot.manifest.machine
    for what, theirs, ours, fits in (
        ("QEMU", config.qemu_version, qemu_version(), _same_series(config.qemu_version)),
        (
            "accelerator",
            config.accelerator,
            " or ".join(sorted(accelerators)),
            config.accelerator in accelerators,
        ),
        (
            "agent protocol",
            snapshot.manifest.guest.agent_version,
            wire.VERSION,
            snapshot.manifest.guest.agent_version == wire.VERSION,
        ),
        ("machine", config.machine, command.MACHINE, config.machine == command.MACHINE),
        ("devices", config.devices, command.DEVICES, config.devices == command.DEVICES),
        (
            "TSC rate (kHz)",
            config.tsc_khz,
            host_tsc_khz(),
            same_rate(config.tsc_khz, host_tsc_khz()),
        ),
    ):
        if not fits:
            raise Incompatible(
                f"snapshot {snapshot.manifest.tag} was made with {what} {theirs}, this host has "
                f"{ours}; its device state cannot be loaded here: build it anew"
            )


def _same_series(version: str) -> bool:
    """microvm is not a versioned machine type: states fit within a major.minor alone."""
    return version.split(".")[:2] == qemu_version().split(".")[:2]
