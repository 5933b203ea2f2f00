"""Which accelerator works here: KVM if it has booted the real kernel, TCG otherwise.

/dev/kvm may open, make a machine and a processor, and still not run a kernel (nested
virtualization). So the guest itself is booted once; the answer is cached by host and guest.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from blake3 import blake3

from ratoon import paths
from ratoon.artifacts import Progress, silent
from ratoon.documents import Document
from ratoon.engine.sandbox.boot import boot, boot_from
from ratoon.errors import RatoonError
from ratoon.machine.guest.build import Guest
from ratoon.machine.vmm.driver import Accelerator, Hardware, Launch
from ratoon.machine.vmm.qemu import qemu_version
from ratoon.store.disk.qcow2 import OverlayTemplates

KVM_DEVICE = Path("/dev/kvm")
PROBE_RAM = 256 * 1024 * 1024
PROBE_DISK = 64 * 1024 * 1024


class Probe(Document):
    """What was found out, and why."""

    accelerator: Accelerator
    reason: str


async def choose_accelerator(guest: Guest, progress: Progress = silent) -> Probe:
    """The accelerator to use on this host, probed once by booting `guest`."""
    if not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return Probe(accelerator="tcg", reason=f"{KVM_DEVICE} cannot be opened")
    path = paths.cache() / "accelerators" / f"{_key(guest)}.json"
    if known := Probe.load_or_none(path):
        return known
    progress("trying whether KVM boots the guest's kernel")
    probe = await _probe(guest)
    progress(f"using {probe.accelerator}: {probe.reason}")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    probe.save(path)
    return probe


def _key(guest: Guest) -> str:
    """Names this start of this host, QEMU, and the guest's kernel: what the answer depends on."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text()
    facts = f"{boot_id}{qemu_version()} {guest.kernel_digest} {guest.initramfs_digest}"
    return blake3(facts.encode()).hexdigest()[:16]


async def _probe(guest: Guest) -> Probe:
    with tempfile.TemporaryDirectory(prefix="ratoon-probe-") as name:
        directory = Path(name)
        memory, disk = directory / "memory", directory / "disk"
        memory.touch()
        os.truncate(memory, PROBE_RAM)
        OverlayTemplates(directory).create(disk, PROBE_DISK)
        launch = Launch(
            name="probe",
            hardware=Hardware(PROBE_RAM, 1, "kvm"),
            memory=memory,
            disks=(),
            overlay=disk,
            log=directory / "log",
            runtime=directory / "run",
            boot=boot_from(guest, "kvm"),
        )
        try:
            booted = await boot(launch, attempts=1)
        except RatoonError as error:
            lines = str(error).splitlines()
            reason = "; ".join(dict.fromkeys((lines[0], lines[-1])))
            return Probe(accelerator="tcg", reason=f"KVM did not boot the guest's kernel: {reason}")
        booted.channel.close()
        await booted.machine.kill()
    return Probe(accelerator="kvm", reason="it booted the guest's kernel")
