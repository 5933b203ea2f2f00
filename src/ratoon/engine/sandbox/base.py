"""Bases: an image is booted cold, and what it becomes is what all else grows from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ratoon import files
from ratoon.api.defaults import DISK_MIB, RAM_MIB
from ratoon.artifacts import Progress, silent
from ratoon.engine.sandbox.accelerator import choose_accelerator
from ratoon.engine.sandbox.boot import boot, boot_from
from ratoon.engine.sandbox.branch import Branched, Brancher
from ratoon.engine.sandbox.confinement import Confiner
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.memory_images import MappedMemory, MemoryImages
from ratoon.engine.sandbox.mounts import Mounts
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.record import new_machine_id, new_record
from ratoon.engine.sandbox.sandbox import Owner, Sandbox
from ratoon.engine.sandbox.stages import Stages
from ratoon.engine.sandbox.start import rebirth, under
from ratoon.engine.sources.host_files import take
from ratoon.engine.sources.image import Image
from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.errors import InvalidInput
from ratoon.machine.guest.build import Guest, build_guest, with_kernel
from ratoon.machine.guest.defaults import set_defaults
from ratoon.machine.guest.practice import practise
from ratoon.machine.guest.shared import wire
from ratoon.machine.host.limits import Limits
from ratoon.machine.network.policy import NONE, NetworkPolicy
from ratoon.machine.vmm import command
from ratoon.machine.vmm.driver import Accelerator, Hardware, Launch
from ratoon.machine.vmm.qemu import qemu_version
from ratoon.machine.vmm.tsc import host_tsc_khz
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.snapshot.image_config import ImageConfig
from ratoon.store.snapshot.manifest import GuestInfo, MachineConfig
from ratoon.store.snapshot.store import Store
from ratoon.units import MIB

RAM_BYTES = RAM_MIB * MIB
DISK_BYTES = DISK_MIB * MIB


@dataclass(frozen=True)
class Built:
    """A snapshot that was built from scratch: how its branch and all of it went.

    `stages` are those of the whole operation, in milliseconds; `branched.stages` are within its
    `branch`.
    """

    branched: Branched
    stages: dict[str, float]
    total_ms: float


@dataclass(frozen=True)
class _Source:
    """What a base is booted from; `image` is kept in its manifest, where it is one."""

    name: str
    image: Image | None
    guest: Guest
    disk: Path
    disk_bytes: int
    hardware: Hardware
    network: NetworkPolicy


class BaseBuilder:
    """Boots images, and publishes what came of it."""

    def __init__(
        self,
        store: Store,
        images: ImageStore,
        memory_images: MemoryImages,
        brancher: Brancher,
        confiner: Confiner,
        runtime: Path,
    ) -> None:
        self._store = store
        self._images = images
        self._memory_images = memory_images
        self._brancher = brancher
        self._confiner = confiner
        self._runtime = runtime

    async def from_image(
        self,
        image: str,
        tag: str,
        *,
        ram_bytes: int = RAM_BYTES,
        vcpus: int = 1,
        disk_bytes: int = DISK_BYTES,
        network: NetworkPolicy = NONE,
        refresh: bool = False,
        roots: Sequence[Path] | None = None,
        progress: Progress = silent,
    ) -> Built:
        """Boot `image` cold and publish it as the base snapshot `tag`; see `sources.resolve`.

        `network`: what its forks may reach unless they are given something else; the boot itself
        reaches nothing. `refresh`: look the image up again. `roots`: where it may lie on this host.
        """
        self._check(tag, ram_bytes, vcpus)
        stages = Stages()
        with stages("build"):
            found = await asyncio.to_thread(
                resolve, image, refresh=refresh, roots=roots, progress=progress
            )
            guest, disk, accelerator = await _build(found, disk_bytes, progress)
        hardware = Hardware(ram_bytes, vcpus, accelerator)
        source = _Source(found.name, found, guest, disk, disk_bytes, hardware, network)
        return await self._make(source, tag, stages, progress)

    async def from_files(
        self,
        kernel: Path,
        rootfs: Path,
        tag: str,
        *,
        roots: Sequence[Path],
        ram_bytes: int = RAM_BYTES,
        vcpus: int = 1,
        network: NetworkPolicy = NONE,
        progress: Progress = silent,
    ) -> Built:
        """As `from_image`, of a kernel and a raw disk with ext4, below one of `roots`; see `take`.

        The kernel must have the drivers that Debian's has as modules, or be that one.
        """
        self._check(tag, ram_bytes, vcpus)
        stages = Stages()
        with self._store.scratch() as room:
            with stages("build"):
                given = await asyncio.to_thread(take, kernel, rootfs, roots, room)
                ours = await asyncio.to_thread(build_guest, progress)
                guest = await asyncio.to_thread(with_kernel, ours, given.kernel)
                probe = await choose_accelerator(guest, progress)
            hardware = Hardware(ram_bytes, vcpus, probe.accelerator)
            source = _Source(
                str(rootfs), None, guest, given.disk, given.disk_bytes, hardware, network
            )
            return await self._make(source, tag, stages, progress)

    def _check(self, tag: str, ram_bytes: int, vcpus: int) -> None:
        self._store.require_free(tag)
        if ram_bytes < 128 * MIB or ram_bytes % PAGE_SIZE:
            raise InvalidInput(f"{ram_bytes} bytes of RAM: use 128 MiB or more, in whole pages")
        if not 1 <= vcpus <= 64:
            raise InvalidInput(f"{vcpus} virtual CPUs: use 1 to 64")

    async def _make(self, source: _Source, tag: str, stages: Stages, progress: Progress) -> Built:
        hardware = source.hardware
        progress(
            f"booting {source.name} with {hardware.ram_bytes // MIB} MiB of RAM "
            f"on {hardware.accelerator}"
        )
        with stages("boot"):
            sandbox, agent_version = await self._boot(
                source.guest, source.disk, hardware, source.network
            )
        async with sandbox:
            with stages("warm"):
                if source.image:
                    await set_defaults(sandbox, source.image.config)
                async with sandbox.in_use() as channel:
                    kind = under(source.network, wire.PRACTICE)
                    await practise(channel, sandbox.id, sandbox.machine_id, kind)
            with stages("branch"):
                progress(f"taking snapshot {tag}")
                info = GuestInfo(
                    image=source.name,
                    agent_version=agent_version,
                    digest=source.image.digest if source.image else None,
                    config=source.image.config if source.image else ImageConfig(),
                )
                config = _config(hardware, source.guest, source.disk_bytes)
                branched = await self._brancher.branch(sandbox, tag, base=(config, info))
        with stages("image"):
            await self._memory_images.make_image(branched.snapshot)
        return Built(branched, stages.ms, stages.total_ms)

    async def boot(self, image: str) -> Sandbox:
        """A sandbox that was booted cold and stands on no snapshot: to compare forks with."""
        found = await asyncio.to_thread(resolve, image)
        guest, disk, accelerator = await _build(found, DISK_BYTES, silent)
        sandbox, _ = await self._boot(guest, disk, Hardware(RAM_BYTES, 1, accelerator), NONE)
        try:
            await set_defaults(sandbox, found.config)
        except BaseException:
            await sandbox.kill()
            raise
        return sandbox

    async def _boot(
        self, guest: Guest, disk: Path, hardware: Hardware, network: NetworkPolicy
    ) -> tuple[Sandbox, int]:
        """A cold-booted sandbox: a fork of all-zero RAM, given a kernel and no device state."""
        zero = await asyncio.to_thread(self._images.make, (), hardware.ram_bytes // PAGE_SIZE)
        memory = MappedMemory.of(zero)
        directory = SandboxDirectory.create(self._store.sandboxes, self._store.lock, self._runtime)
        try:
            overlay = directory.next_overlay()
            await asyncio.to_thread(files.copy_sparse, disk, overlay)
            async with self._confiner.confine(directory.path, NONE, Limits()) as confined:
                launch = Launch(
                    name=directory.id,
                    hardware=hardware,
                    memory=memory.path,
                    disks=(),
                    overlay=overlay,
                    log=directory.log,
                    runtime=directory.next_runtime(),
                    boot=boot_from(guest, hardware.accelerator),
                    netns=confined.namespace.fd,
                )
                booted = await boot(launch)
        except BaseException:
            await directory.delete()
            raise
        run = Incarnation(
            booted.machine, booted.channel, memory, overlay, launch.runtime, confined.namespace
        )
        options = SandboxOptions(network=network)
        record = new_record(directory.id, new_machine_id(), options, None)
        sandbox = Sandbox(
            directory, run, record, Owner(), parent=None, origin=None, mounts=Mounts.none()
        )
        try:
            kind = under(network, wire.FORK)
            await rebirth(sandbox.id, sandbox.machine_id, run.machine, run.channel, kind)
        except BaseException:
            await sandbox.kill()
            raise
        return sandbox, booted.agent_version


async def _build(
    image: Image, disk_bytes: int, progress: Progress
) -> tuple[Guest, Path, Accelerator]:
    """What a boot of `image` takes: kernel and initramfs, root disk, accelerator."""
    guest = await asyncio.to_thread(build_guest, progress)
    disk = await asyncio.to_thread(root_disk, image, disk_bytes, progress)
    probe = await choose_accelerator(guest, progress)
    return guest, disk, probe.accelerator


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
