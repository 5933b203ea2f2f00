"""Bases: an image is booted cold, and what it becomes is what all else grows from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from ratoon import files
from ratoon.api.defaults import DISK_MIB, RAM_MIB
from ratoon.artifacts import Progress, silent
from ratoon.concurrency import uncancelled
from ratoon.engine.sandbox.accelerator import Probe, choose_accelerator, choose_cpu
from ratoon.engine.sandbox.boot import boot, boot_from
from ratoon.engine.sandbox.branch import Branched
from ratoon.engine.sandbox.capture import Buffers, capture_last, reserve
from ratoon.engine.sandbox.confinement import Confiner
from ratoon.engine.sandbox.deaths import sandbox_death_as_error
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.layer import Provenance, publish_layer
from ratoon.engine.sandbox.memory_images import MappedMemory, MemoryImages
from ratoon.engine.sandbox.record import new_machine_id
from ratoon.engine.sandbox.stages import Stages
from ratoon.engine.sandbox.start import oserror_as_hosterror, rebirth, under
from ratoon.engine.sources.host_files import take
from ratoon.engine.sources.image import Image
from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.errors import InvalidInput
from ratoon.machine.guest.build import Guest, build_guest, with_kernel
from ratoon.machine.guest.defaults import change_defaults
from ratoon.machine.guest.practice import practise
from ratoon.machine.guest.shared import wire
from ratoon.machine.host.limits import Limits
from ratoon.machine.network.policy import NONE, NetworkPolicy
from ratoon.machine.vmm import command
from ratoon.machine.vmm.cpu import named_model
from ratoon.machine.vmm.driver import Hardware, Launch
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


@dataclass(frozen=True)
class BootedGuest:
    """A guest that was booted cold: it stands on no snapshot, and is no sandbox."""

    incarnation: Incarnation
    name: str
    machine_id: str
    agent_version: int


class BaseBuilder:
    """Boots images, and publishes what came of it."""

    def __init__(
        self,
        store: Store,
        images: ImageStore,
        memory_images: MemoryImages,
        buffers: Buffers,
        confiner: Confiner,
        runtime: Path,
    ) -> None:
        self._store = store
        self._images = images
        self._memory_images = memory_images
        self._buffers = buffers
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
        cpu: str | None = None,
        network: NetworkPolicy = NONE,
        refresh: bool = False,
        roots: Sequence[Path] | None = None,
        progress: Progress = silent,
    ) -> Built:
        """Boot `image` cold and publish it as the base snapshot `tag`; see `sources.resolve`.

        `cpu`: the processors' model, see `vmm.cpu.named_model`; None: all that the accelerator has.
        `network`: what its forks may reach unless they are given something else; the boot itself
        reaches nothing. `refresh`: look the image up again. `roots`: where it may lie on this host.
        """
        self._check(tag, ram_bytes, vcpus, cpu)
        stages = Stages()
        with stages("build"):
            found = await asyncio.to_thread(
                resolve, image, refresh=refresh, roots=roots, progress=progress
            )
            guest, disk, probe = await _build(found, disk_bytes, progress)
            model = await choose_cpu(cpu, probe)
        hardware = Hardware(ram_bytes, vcpus, probe.accelerator, model)
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
        cpu: str | None = None,
        network: NetworkPolicy = NONE,
        progress: Progress = silent,
    ) -> Built:
        """As `from_image`, of a kernel and a raw disk with ext4, below one of `roots`; see `take`.

        The kernel must have the drivers that Debian's has as modules, or be that one.
        """
        self._check(tag, ram_bytes, vcpus, cpu)
        stages = Stages()
        with self._store.scratch() as room:
            with stages("build"):
                given = await asyncio.to_thread(take, kernel, rootfs, roots, room)
                ours = await asyncio.to_thread(build_guest, progress)
                guest = await asyncio.to_thread(with_kernel, ours, given.kernel)
                probe = await choose_accelerator(guest, progress)
                model = await choose_cpu(cpu, probe)
            hardware = Hardware(ram_bytes, vcpus, probe.accelerator, model)
            source = _Source(
                str(rootfs), None, guest, given.disk, given.disk_bytes, hardware, network
            )
            return await self._make(source, tag, stages, progress)

    def _check(self, tag: str, ram_bytes: int, vcpus: int, cpu: str | None) -> None:
        self._store.require_free(tag)
        if ram_bytes < 128 * MIB or ram_bytes % PAGE_SIZE:
            raise InvalidInput(f"{ram_bytes} bytes of RAM: use 128 MiB or more, in whole pages")
        if not 1 <= vcpus <= 64:
            raise InvalidInput(f"{vcpus} virtual CPUs: use 1 to 64")
        if cpu is not None:
            named_model(cpu)

    async def _make(self, source: _Source, tag: str, stages: Stages, progress: Progress) -> Built:
        hardware = source.hardware
        progress(
            f"booting {source.name} with {hardware.ram_bytes // MIB} MiB of RAM "
            f"on {hardware.accelerator}"
        )
        async with AsyncExitStack() as stack:
            with stages("boot"):
                booting = self._booted(source.guest, source.disk, hardware, source.network)
                guest = await stack.enter_async_context(booting)
            run = guest.incarnation
            with stages("warm"):
                async with sandbox_death_as_error(guest.name, run.machine):
                    if source.image:
                        await _run_as(run, source.image.config)
                    kind = under(source.network, wire.PRACTICE)
                    await practise(run.channel, guest.name, guest.machine_id, kind)
            with stages("branch"):
                progress(f"taking snapshot {tag}")
                branched = await uncancelled(self._publish(guest, source, tag))
        with stages("image"):
            await self._memory_images.make_image(branched.snapshot)
        return Built(branched, stages.ms, stages.total_ms)

    async def _publish(self, guest: BootedGuest, source: _Source, tag: str) -> Branched:
        info = GuestInfo(
            image=source.name,
            agent_version=guest.agent_version,
            digest=source.image.digest if source.image else None,
            config=source.image.config if source.image else ImageConfig(),
        )
        config = _config(source.hardware, source.guest, source.disk_bytes)
        run, stages = guest.incarnation, Stages()
        with (
            oserror_as_hosterror(f"snapshot {tag} was not written"),
            self._store.stage(tag) as staging,
            self._buffers.borrow() as buffer,
        ):
            with stages("prepare"):
                await reserve(run, buffer)
            captured, still = await capture_last(run, buffer, stages)
            snapshot = await asyncio.to_thread(
                publish_layer,
                staging,
                self._memory_images,
                None,
                captured,
                run.overlay,
                Provenance(config, info, source.network, guest.name, still.warning),
                stages,
            )
            size = snapshot.manifest.layers[-1].memory.size
            return Branched(snapshot, stages.ms, len(captured.numbers), size)

    @asynccontextmanager
    async def boot(self, image: str) -> AsyncIterator[BootedGuest]:
        """A guest that was booted cold, to compare forks with; it ends with the block."""
        found = await asyncio.to_thread(resolve, image)
        guest, disk, probe = await _build(found, DISK_BYTES, silent)
        hardware = Hardware(RAM_BYTES, 1, probe.accelerator, probe.cpu)
        async with self._booted(guest, disk, hardware, NONE) as booted:
            await _run_as(booted.incarnation, found.config)
            yield booted

    @asynccontextmanager
    async def _booted(
        self, guest: Guest, disk: Path, hardware: Hardware, network: NetworkPolicy
    ) -> AsyncIterator[BootedGuest]:
        """A fork of all-zero RAM, given a kernel and no device state; it ends with the block."""
        zero = await asyncio.to_thread(self._images.make, (), hardware.ram_bytes // PAGE_SIZE)
        memory = MappedMemory.of(zero)
        directory = SandboxDirectory.create(self._store.sandboxes, self._store.lock, self._runtime)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(directory.delete)
            overlay = directory.next_overlay()
            await asyncio.to_thread(files.copy_sparse, disk, overlay)
            namespace = (await self._confiner.confine(directory.path, NONE, Limits())).namespace
            stack.push_async_callback(namespace.release)
            launch = Launch(
                name=directory.id,
                hardware=hardware,
                memory=memory.path,
                disks=(),
                overlay=overlay,
                log=directory.log,
                runtime=directory.next_runtime(),
                boot=boot_from(guest, hardware.accelerator),
                netns=namespace.fd,
            )
            booted = await boot(launch)
            run = Incarnation(
                booted.machine, booted.channel, memory, overlay, launch.runtime, namespace
            )
            stack.push_async_callback(run.end)
            found = BootedGuest(run, directory.id, new_machine_id(), booted.agent_version)
            kind = under(network, wire.FORK)
            await rebirth(found.name, found.machine_id, run.machine, run.channel, kind)
            yield found


async def _run_as(guest: Incarnation, config: ImageConfig) -> None:
    await change_defaults(guest.channel, config.env, config.user, config.workdir)


async def _build(image: Image, disk_bytes: int, progress: Progress) -> tuple[Guest, Path, Probe]:
    """What a boot of `image` takes: kernel and initramfs, root disk, accelerator."""
    guest = await asyncio.to_thread(build_guest, progress)
    disk = await asyncio.to_thread(root_disk, image, disk_bytes, progress)
    return guest, disk, await choose_accelerator(guest, progress)


def _config(hardware: Hardware, guest: Guest, disk_bytes: int) -> MachineConfig:
    return MachineConfig(
        ram_bytes=hardware.ram_bytes,
        vcpus=hardware.vcpus,
        cpu=hardware.cpu,
        accelerator=hardware.accelerator,
        qemu_version=qemu_version(),
        tsc_khz=host_tsc_khz(),
        kernel_digest=guest.kernel_digest,
        initramfs_digest=guest.initramfs_digest,
        disk_bytes=disk_bytes,
        devices=command.DEVICES,
    )
