"""Which accelerator works here: KVM if it has booted the real kernel, TCG otherwise.

/dev/kvm may open, make a machine and a processor, and still not run a kernel, or run it slower than
an emulator does (nested virtualization). So the guest itself is booted once; the answer is cached
by host and guest.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

from blake3 import blake3

from ratoon import paths
from ratoon.artifacts import Progress, silent
from ratoon.documents import Document
from ratoon.engine.sandbox.boot import boot, boot_from
from ratoon.errors import BootTimeout, Incompatible, MachineDied, RatoonError
from ratoon.machine.guest.build import Guest, build_guest
from ratoon.machine.vmm import kvm
from ratoon.machine.vmm.bare import bare_launch
from ratoon.machine.vmm.cpu import EMULATED, NATIVE, Settled, named_model, settle
from ratoon.machine.vmm.driver import Accelerator, Hardware
from ratoon.machine.vmm.qemu import QemuMachine, qemu_version
from ratoon.store.snapshot.manifest import MachineConfig

PROBE_RAM = 256 * 1024 * 1024
#: Seconds that KVM has for a boot; or, on a loaded host, so many times what TCG needs meanwhile.
PATIENCE, TIMES = 20.0, 3
#: Seconds for which a failure is believed that may be the moment's: no memory, too much load.
EXPIRY = 3600.0


class Probe(Document):
    """What was found out, and why; the processor that guests get, unless told otherwise.

    `details`: what QEMU and the kernel said. `until`: when it is to be found out again, in Unix
    time; None: not before the host is started anew, or QEMU or the guest is another.
    """

    accelerator: Accelerator
    cpu: str
    reason: str
    details: str = ""
    until: float | None = None


async def choose_accelerator(guest: Guest, progress: Progress = silent) -> Probe:
    """The accelerator to use on this host, probed once by booting `guest`."""
    if not kvm.opens():
        return without_kvm()
    path = _path(guest.kernel_digest, guest.initramfs_digest)
    if known := _known(path):
        return known
    progress("trying whether KVM boots the guest's kernel")
    probe = await _probe(guest)
    progress(f"using {probe.accelerator}: {probe.reason}")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    probe.save(path)
    return probe


def without_kvm() -> Probe:
    """What there is to know of a host whose KVM cannot even be opened."""
    return _emulated(f"{kvm.DEVICE} cannot be opened")


async def choose_cpu(name: str | None, probe: Probe) -> str:
    """The model of a base's processors: by its `name`, or as the probe found it.

    InvalidInput: there is no such one; Incompatible: this host lacks some of its features.
    """
    if name is None:
        return probe.cpu
    model = named_model(name)
    return (await settle_here(model)).model if probe.accelerator == "kvm" else model


class KvmGate:
    """Whether device states that were saved under KVM can run here."""

    def __init__(self) -> None:
        #: The answer for Ratoon's own guest, where it had to be found out for another's state.
        self._ours: Probe | None = None

    async def check(self, tag: str, config: MachineConfig) -> None:
        """Incompatible unless the machine of snapshot `tag` can run here."""
        if config.accelerator != "kvm":
            return
        probe = await self._answer(config)
        if probe.accelerator != "kvm":
            raise Incompatible(
                f"snapshot {tag} was made under KVM, which does not work on this host: "
                f"{probe.reason}; fork it where KVM works, or build it anew here"
            )

    async def _answer(self, config: MachineConfig) -> Probe:
        if not kvm.opens():
            return without_kvm()
        if known := _known(_path(config.kernel_digest, config.initramfs_digest)):
            return known
        if self._ours is None or _is_over(self._ours):
            self._ours = await choose_accelerator(await asyncio.to_thread(build_guest))
        return self._ours


def _emulated(reason: str, *, details: str = "", until: float | None = None) -> Probe:
    return Probe(accelerator="tcg", cpu=EMULATED, reason=reason, details=details, until=until)


def _known(path: Path) -> Probe | None:
    known = Probe.load_or_none(path)
    return None if known is None or _is_over(known) else known


def _is_over(probe: Probe) -> bool:
    return probe.until is not None and probe.until < time.time()


def _path(kernel_digest: str, initramfs_digest: str) -> Path:
    """Named by this start of this host, KVM, QEMU, and the guest: what the answer depends on.

    All of the guest: what fails may be its agent, and may be mended in the next one.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    facts = (boot_id, kvm.state_of_modules(), qemu_version(), kernel_digest, initramfs_digest)
    name = blake3("\n".join(facts).encode()).hexdigest()[:16]
    return paths.cache() / "accelerators" / f"{name}.json"


async def _probe(guest: Guest) -> Probe:
    try:
        settled = await settle_here(NATIVE)
        trial = await seconds_to_boot(guest, "kvm", settled.model, PATIENCE)
        if trial is None:
            return await _compare(guest, settled)
    except RatoonError as error:
        # QEMU names KVM where it is to blame; a host without memory, say, may have some later.
        lasting = isinstance(error, MachineDied) and "kvm" in error.log_tail.lower()
        return _emulated(
            "KVM did not boot the guest's kernel",
            details=str(error),
            until=None if lasting else time.time() + EXPIRY,
        )
    return _works(settled)


async def _compare(guest: Guest, settled: Settled) -> Probe:
    """KVM has taken too long: is it slow, or has the host too much to do?"""
    emulated = await seconds_to_boot(guest, "tcg", EMULATED, None)
    assert emulated is not None
    limit = max(PATIENCE, TIMES * emulated)
    if limit > PATIENCE and await seconds_to_boot(guest, "kvm", settled.model, limit) is not None:
        return _works(settled)
    return _emulated(
        f"KVM is slower than emulation here: it had not booted the guest after {limit:.0f} s, "
        f"for which the emulator took {emulated:.0f} s"
    )


def _works(settled: Settled) -> Probe:
    without = f", without {', '.join(settled.masked)}" if settled.masked else ""
    return Probe(
        accelerator="kvm", cpu=settled.model, reason=f"it booted the guest's kernel{without}"
    )


async def seconds_to_boot(
    guest: Guest, accelerator: Accelerator, cpu: str, limit: float | None
) -> float | None:
    """Boot the guest, with an empty disk; None if that was not done within `limit`."""
    hardware = Hardware(PROBE_RAM, 1, accelerator, cpu)
    with bare_launch(hardware) as launch:
        began = time.monotonic()
        try:
            async with asyncio.timeout(limit):
                booted = await boot(replace(launch, boot=boot_from(guest, accelerator)), attempts=1)
        except TimeoutError:
            return None
        except BootTimeout:  # it did not even say a word
            if limit is None:
                raise
            return None
        booted.channel.close()
        await booted.machine.kill()
        return time.monotonic() - began


async def settle_here(model: str) -> Settled:
    """That model as this host's KVM has it; see `settle`."""

    async def expand(model: str) -> dict[str, object]:
        with bare_launch(Hardware(PROBE_RAM, 1, "kvm", model)) as launch:
            machine = await QemuMachine.start(launch)
            try:
                return await machine.expand(model)
            finally:
                await machine.kill()

    return await settle(model, expand)
