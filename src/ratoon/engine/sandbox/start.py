"""Starting a machine from a snapshot, in two halves.

`MachineStarter.prepare` does all that need not know why: files are verified, QEMU is started on the
head's memory and waits for its device state. `MachineStarter.wake` loads the state, lets the guest
run and makes it the individual it shall be. A pool keeps machines between the two, and has them
load and rehearse: QEMU translates what a guest runs for the first time, and keeps that.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ratoon import files
from ratoon.engine.sandbox.accelerator import KvmGate
from ratoon.engine.sandbox.compatible import check_compatible
from ratoon.engine.sandbox.confinement import Confiner
from ratoon.engine.sandbox.deaths import sandbox_death_as_error
from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.engine.sandbox.disks import DiskChooser, HeldDisk
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.memory_images import (
    ATTEMPTS,
    MappedMemory,
    MemoryImages,
    Patch,
    write_patch,
)
from ratoon.engine.sandbox.mounts import Mounts
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.record import new_machine_id
from ratoon.engine.sandbox.stages import Stages
from ratoon.errors import HostError
from ratoon.jail.steps import LostName
from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.defaults import change_defaults
from ratoon.machine.guest.practice import rehearse
from ratoon.machine.guest.shared import wire
from ratoon.machine.host.limits import Limits
from ratoon.machine.network.namespaces import Namespace
from ratoon.machine.network.policy import NONE, NetworkPolicy
from ratoon.machine.vmm.driver import Hardware, Launch, Machine
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.store.disk.qcow2 import OverlayTemplates
from ratoon.store.snapshot.snapshot import Snapshot, read_vmstate
from ratoon.store.snapshot.verify import verify_disks

#: Seconds the agent may take for a rebirth; a loaded host under emulation is slow.
REBIRTH_TIMEOUT = 60.0


@dataclass
class PreparedMachine:
    """A machine that waits for its device state, with its RAM as it must be."""

    #: The id of the snapshot that it was started on, and whether that has a warning.
    snapshot_id: str
    warned: bool
    machine: Machine
    state: bytes
    memory: MappedMemory
    overlay: Path
    runtime: Path
    namespace: Namespace
    #: What it has to itself; the process ends before the rest is let go of.
    own: AsyncExitStack
    #: To its agent, once its device state is loaded.
    channel: Channel | None = None

    async def discard(self) -> None:
        """End the machine, and remove what it had to itself."""
        await self.own.aclose()


@dataclass(frozen=True)
class Verified:
    """What of a snapshot was verified for a start: its device state, and its disk, to be closed."""

    state: bytes
    disk: HeldDisk


async def _stands() -> None:
    """The twin is there already."""


async def _handed_over() -> None:
    """Nobody else has its volumes."""


class MachineStarter:
    """Starts machines for the directories of sandboxes."""

    def __init__(
        self,
        memory_images: MemoryImages,
        disks: DiskChooser,
        templates: OverlayTemplates,
        confiner: Confiner,
        *,
        survives: bool,
    ) -> None:
        """`survives`: the machines outlive this process."""
        self._kvm = KvmGate()
        self._memory_images = memory_images
        self._disks = disks
        self._templates = templates
        self._confiner = confiner
        self._survives = survives

    async def expect_many(self, source: Snapshot) -> None:
        """Have what many machines on `source` share: its image, and soon a flattened disk.

        Corrupt, NotFound, Incompatible with this host.
        """
        await self._check_host(source)
        self._disks.expect_many(source)
        await self._memory_images.make_image(source)

    async def verify(self, source: Snapshot, stages: Stages) -> Verified:
        """The device state and the disk of `source`, checked.

        Corrupt names the file. Incompatible with this host.
        """
        with stages("verify"):
            await self._check_host(source)
            disk = self._disks.hold(source)
            try:
                await asyncio.to_thread(verify_disks, source, disk.covered)
                return Verified(read_vmstate(source), disk)
            except BaseException:
                disk.close()
                raise

    async def _check_host(self, source: Snapshot) -> None:
        check_compatible(source)
        await self._kvm.check(source.manifest.tag, source.manifest.machine)

    async def prepare(
        self,
        directory: SandboxDirectory,
        twin: Snapshot,
        verified: Verified,
        options: SandboxOptions,
        stages: Stages,
        *,
        stands: Callable[[], Awaitable[object]] = _stands,
        published: Snapshot | None = None,
    ) -> PreparedMachine:
        """Start a machine on `twin`, the directory's own links to a snapshot.

        `stands` waits until the twin is there; until then it is not touched. `published`: where an
        image is made from, if that is not the twin. Corrupt names the page that is damaged. If this
        fails, the process is gone, and what it had to itself.
        """
        for _ in range(ATTEMPTS):
            try:
                return await self._prepare(
                    directory, twin, verified, options, stages, stands, published
                )
            except LostName:  # its image was evicted: another is chosen, or made
                continue
        raise self._memory_images.evicted(published or twin)

    async def _prepare(
        self,
        directory: SandboxDirectory,
        twin: Snapshot,
        verified: Verified,
        options: SandboxOptions,
        stages: Stages,
        stands: Callable[[], Awaitable[object]],
        published: Snapshot | None,
    ) -> PreparedMachine:
        assert options.network is not None
        with stages("image"):
            image, patch = (
                self._memory_images.open(twin) if verified.disk.is_whole(twin) else None,
                None,
            )
            if image is None:
                await stands()
                image, patch = await self._memory_images.choose(twin, published or twin)
        overlay, runtime = directory.next_overlay(), directory.next_runtime()
        memory, config = MappedMemory.of_image(image), twin.manifest.machine
        async with AsyncExitStack() as own:
            with image:
                own.callback(_remove, overlay, runtime)
                with stages("overlay"):
                    self._templates.create(overlay, config.disk_bytes)
                confined = await self._confiner.confine(
                    directory.path, options.network, options.limits
                )
                own.push_async_callback(confined.namespace.release)
                launch = Launch(
                    name=directory.id,
                    hardware=Hardware(
                        config.ram_bytes, config.vcpus, config.accelerator, config.cpu
                    ),
                    # By descriptor: the name may be gone by now.
                    memory=Path(f"/proc/self/fd/{image.fd}"),
                    disks=verified.disk.paths(twin),
                    overlay=overlay,
                    log=directory.log,
                    runtime=runtime,
                    netns=confined.namespace.fd,
                    resolver=confined.namespace.resolver,
                    restrict=confined.namespace.restrict,
                    cgroup=confined.cgroup,
                    file_limit=confined.file_limit,
                    survives=self._survives,
                )
                machine = await self._start(launch, memory, patch, stages, own)
                await stands()
            return PreparedMachine(
                twin.manifest.id,
                twin.manifest.warning is not None,
                machine,
                verified.state,
                memory,
                overlay,
                runtime,
                confined.namespace,
                own.pop_all(),
            )

    async def limit(
        self, directory: SandboxDirectory, prepared: PreparedMachine, limits: Limits
    ) -> None:
        """Give a machine that was prepared without limits these. HostError."""
        if limits != Limits():
            group = await asyncio.to_thread(self._confiner.group, directory.path, limits)
            await prepared.machine.confine(group, limits.disk_bytes)

    async def wake(
        self,
        name: str,
        machine_id: str,
        prepared: PreparedMachine,
        stages: Stages,
        mounts: Mounts,
        options: SandboxOptions,
        *,
        resume: bool = False,
        hand_over: Callable[[], Awaitable[object]] = _handed_over,
    ) -> Incarnation:
        """Let the prepared machine run as the individual `name`, whose agent has then answered.

        `mounts`: its volumes, which are its own once `hand_over` is done; `resume`: it has been
        that individual before, and only stood by.

        MachineDied, MachineError, GuestError; InvalidInput: its commands cannot be run as its
        options say. The process is gone then.
        """
        machine, volumes = prepared.machine, None
        try:
            with stages("load"):
                channel = prepared.channel or await self._load(name, prepared)
            await hand_over()
            # What the snapshot's guest had yet to write must not come after what was written since.
            doubtful = prepared.warned and not resume
            own = Mounts.none() if doubtful else mounts
            volumes = own.serve(name, machine, inherits=doubtful)
            with stages("resume"):
                await machine.resume()
            with stages("rebirth"):
                kind = under(prepared.namespace.policy, wire.RESUME if resume else wire.FORK)
                inherits = await rebirth(name, machine_id, machine, channel, kind)
            if volumes or inherits:
                with stages("volumes"):
                    if volumes and doubtful:
                        async with sandbox_death_as_error(name, machine):
                            await own.arrange(channel, stale=False)
                        await asyncio.to_thread(volumes.close)
                        volumes = None
                    volumes = volumes or mounts.serve(name, machine, inherits=True)
                    async with sandbox_death_as_error(name, machine):
                        await mounts.arrange(channel, stale=not resume)
            if not resume and (options.env or options.user or options.workdir):
                with stages("defaults"):
                    async with sandbox_death_as_error(name, machine):
                        await change_defaults(channel, options.env, options.user, options.workdir)
        except BaseException:
            await prepared.discard()
            if volumes:
                await asyncio.to_thread(volumes.close)
            raise
        return Incarnation(
            machine,
            channel,
            prepared.memory,
            prepared.overlay,
            prepared.runtime,
            prepared.namespace,
            volumes,
        )

    async def _load(self, name: str, prepared: PreparedMachine) -> Channel:
        machine = prepared.machine
        async with sandbox_death_as_error(name, machine):
            prepared.channel = channel = await Channel.connect(machine.agent_socket, name)
        prepared.own.callback(channel.close)
        await machine.load_state(prepared.state)
        prepared.state = b""  # QEMU has it
        return channel

    async def rehearse(self, name: str, prepared: PreparedMachine) -> bool:
        """Have a prepared machine do what a fork does first, and stand still again until it wakes.

        False: its guest has volumes, and cannot without them; it is lost then. Errors: as `wake`.
        """
        machine = prepared.machine
        channel = await self._load(name, prepared)
        await machine.resume()
        kind = under(prepared.namespace.policy, wire.REHEARSAL)
        async with sandbox_death_as_error(name, machine):
            done = await rehearse(channel, name, new_machine_id(), kind)
        await machine.pause()
        return done

    async def _start(
        self,
        launch: Launch,
        memory: MappedMemory,
        patch: Patch | None,
        stages: Stages,
        own: AsyncExitStack,
    ) -> QemuMachine:
        """Start the machine and, meanwhile, read and check the pages to be written into it."""
        reading = None
        if patch:
            reading = asyncio.create_task(asyncio.to_thread(self._memory_images.read_patch, patch))
        try:
            with stages("start"):
                machine = await QemuMachine.start(launch)
        except BaseException:
            if reading:
                with suppress(Exception):
                    await reading
            raise
        own.push_async_callback(machine.kill)
        if reading:
            with stages("image"):
                pages = await reading
                await asyncio.to_thread(write_patch, machine.pid, memory, pages)
        return machine


def _remove(overlay: Path, runtime: Path) -> None:
    overlay.unlink(missing_ok=True)
    shutil.rmtree(runtime, ignore_errors=True)


@contextmanager
def oserror_as_hosterror(what: str) -> Iterator[None]:
    """Turn the errors of files into HostError: `what` was not done, and why."""
    try:
        yield
    except OSError as error:
        raise HostError(f"{what}: {files.describe(error)}") from error


def under(network: NetworkPolicy, kind: int) -> int:
    """That kind of rebirth (see wire.FORK) of a guest to which `network` applies."""
    return kind if network == NONE else kind | wire.ONLINE


async def rebirth(
    name: str, machine_id: str, machine: Machine, channel: Channel, kind: int
) -> bool:
    """Begin a fresh session with the agent and make the guest an individual of its own.

    It gets entropy, the time, names, and routes if there is a way out; only then do the sandbox's
    processes run. `kind`: see `under`. Returns whether it has mounts of volumes from before.
    """
    async with sandbox_death_as_error(name, machine):
        channel.begin()
        return await channel.rebirth(name, machine_id, kind, timeout=REBIRTH_TIMEOUT)
