"""Starting a machine from a snapshot, in two halves.

`Starter.prepare` does all that need not know why: files are verified, QEMU is started on the head's
memory and waits for its device state. `Starter.wake` loads the state, lets the guest run and makes
it the individual it shall be. A pool keeps machines between the two.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ratoon import files
from ratoon.disk.qcow2 import OverlayTemplates
from ratoon.errors import HostError
from ratoon.guest.channel import Channel
from ratoon.host.limits import Limits
from ratoon.network.namespaces import Namespace
from ratoon.sandbox.confinement import Confiner
from ratoon.sandbox.deaths import explained
from ratoon.sandbox.directory import SandboxDirectory
from ratoon.sandbox.heads import Heads, MappedMemory, Patch, write_patch
from ratoon.sandbox.incarnation import Incarnation
from ratoon.sandbox.options import SandboxOptions
from ratoon.sandbox.stages import Stages
from ratoon.snapshot.snapshot import Snapshot, read_vmstate
from ratoon.snapshot.verify import verify_disks
from ratoon.vmm.driver import Hardware, Launch, Machine
from ratoon.vmm.qemu import QemuMachine

#: Seconds the agent may take for a rebirth; a loaded host under emulation is slow.
REBIRTH_TIMEOUT = 60.0


@dataclass
class Prepared:
    """A machine that waits for its device state, with its RAM as it must be."""

    #: The id of the snapshot that it was started on.
    snapshot_id: str
    machine: Machine
    state: bytes
    memory: MappedMemory
    overlay: Path
    runtime: Path
    namespace: Namespace

    async def discard(self) -> None:
        """End the machine, and remove what it had to itself."""
        await self.machine.kill()
        await self.namespace.release()
        _remove(self.overlay, self.runtime)


class Starter:
    """Starts machines for the directories of sandboxes."""

    def __init__(
        self, heads: Heads, templates: OverlayTemplates, confiner: Confiner, *, survives: bool
    ) -> None:
        """`survives`: the machines outlive this process."""
        self._heads = heads
        self._templates = templates
        self._confiner = confiner
        self._survives = survives

    async def prepare(
        self,
        directory: SandboxDirectory,
        twin: Snapshot,
        state: bytes,
        options: SandboxOptions,
        stages: Stages,
        *,
        published: Snapshot | None = None,
        burst: bool = False,
    ) -> Prepared:
        """Start a machine on `twin`, the directory's own links to a snapshot.

        `state`: see `read_verified`; `published`: where an image is made from, if that is not the
        twin; `burst`: see `Heads.choose`. Corrupt names the page that is damaged. If this fails,
        the process is gone, and what it had to itself.
        """
        assert options.network is not None
        with stages("image"):
            image, patch = await self._heads.choose(twin, published or twin, burst=burst)
        confine = self._confiner.confine(directory.path, options.network, options.limits)
        with image, _own_files(directory) as (overlay, runtime):
            memory = MappedMemory.of_image(image)
            config = twin.manifest.machine
            with stages("overlay"):
                self._templates.create(overlay, config.disk_bytes)
            async with confine as confined:
                launch = Launch(
                    name=directory.id,
                    hardware=Hardware(config.ram_bytes, config.vcpus, config.accelerator),
                    # By descriptor: QEMU makes a new file, all zeros, where the name is gone.
                    memory=Path(f"/proc/self/fd/{image.fd}"),
                    disks=tuple(twin.disk_path(number) for number in range(twin.depth + 1)),
                    overlay=overlay,
                    log=directory.log,
                    runtime=runtime,
                    descriptors=(image.fd,),
                    netns=confined.namespace.fd,
                    restrict=confined.namespace.restrict,
                    cgroup=confined.cgroup,
                    file_limit=confined.file_limit,
                    survives=self._survives,
                )
                machine = await self._start(launch, memory, patch, stages)
        return Prepared(
            twin.manifest.id,
            machine,
            state,
            memory,
            overlay,
            runtime,
            confined.namespace,
        )

    async def limit(self, directory: SandboxDirectory, prepared: Prepared, limits: Limits) -> None:
        """Give a machine that was prepared without limits these. HostError."""
        if limits != Limits():
            group = await asyncio.to_thread(self._confiner.group, directory.path, limits)
            await prepared.machine.confine(group, limits.disk_bytes)

    async def wake(
        self,
        name: str,
        machine_id: str,
        prepared: Prepared,
        stages: Stages,
        *,
        resume: bool = False,
    ) -> Incarnation:
        """Let the prepared machine run as the individual `name`, whose agent has then answered.

        `resume`: it has been that individual before, and only stood by.

        MachineDied, MachineError, GuestError; the process is gone then.
        """
        machine, channel = prepared.machine, None
        try:
            with stages("load"):
                async with explained(name, machine):
                    channel = await Channel.connect(machine.agent_socket, name)
                await machine.load_state(prepared.state)
            with stages("resume"):
                await machine.resume()
            with stages("rebirth"):
                await rebirth(name, machine_id, machine, channel, resume=resume)
        except BaseException:
            if channel:
                channel.close()
            await prepared.discard()
            raise
        return Incarnation(
            machine,
            channel,
            prepared.memory,
            prepared.overlay,
            prepared.runtime,
            prepared.namespace,
        )

    async def _start(
        self, launch: Launch, memory: MappedMemory, patch: Patch | None, stages: Stages
    ) -> QemuMachine:
        """Start the machine and, meanwhile, read and check the pages to be written into it."""
        if patch is None:
            with stages("start"):
                return await QemuMachine.start(launch)
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
                pages = await reading
                await asyncio.to_thread(write_patch, machine.pid, memory, pages)
            return machine
        except BaseException:
            await machine.kill()
            raise


@contextmanager
def _own_files(directory: SandboxDirectory) -> Iterator[tuple[Path, Path]]:
    """Names for the overlay and the sockets of a machine; what is there goes if the block fails."""
    overlay, runtime = directory.next_overlay(), directory.next_runtime()
    try:
        yield overlay, runtime
    except BaseException:
        _remove(overlay, runtime)
        raise


def _remove(overlay: Path, runtime: Path) -> None:
    overlay.unlink(missing_ok=True)
    shutil.rmtree(runtime, ignore_errors=True)


@contextmanager
def explaining(what: str) -> Iterator[None]:
    """Turn the errors of files into HostError: `what` was not done, and why."""
    try:
        yield
    except OSError as error:
        raise HostError(f"{what}: {files.describe(error)}") from error


async def read_verified(snapshot: Snapshot, stages: Stages) -> bytes:
    """The device state of a snapshot whose disks have been checked too. Corrupt names the file."""
    with stages("verify"):
        await asyncio.to_thread(verify_disks, snapshot)
        return read_vmstate(snapshot)


async def rebirth(
    name: str, machine_id: str, machine: Machine, channel: Channel, *, resume: bool = False
) -> None:
    """Begin a fresh session with the agent and make the guest an individual of its own.

    It gets entropy, the time, and names; only then do the sandbox's processes run.
    """
    async with explained(name, machine):
        channel.begin()
        await channel.rebirth(name, machine_id, resume=resume, timeout=REBIRTH_TIMEOUT)
