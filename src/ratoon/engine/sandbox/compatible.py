"""Whether this host can go on with a device state: what must be the same, and what is found out."""

from __future__ import annotations

from ratoon.errors import Incompatible
from ratoon.machine.guest.shared import wire
from ratoon.machine.vmm import command, kvm
from ratoon.machine.vmm.qemu import qemu_version
from ratoon.machine.vmm.tsc import host_tsc_khz, same_rate
from ratoon.store.snapshot.manifest import qemu_series
from ratoon.store.snapshot.snapshot import Snapshot


def check_compatible(snapshot: Snapshot) -> None:
    """Incompatible unless this host can load the snapshot's device state; names both sides.

    Whether its accelerator works here, and has its processor, is found out as it starts.
    """
    config = snapshot.manifest.machine
    for what, theirs, ours, fits in (
        ("QEMU", config.qemu_version, qemu_version(), _same_series(config.qemu_version)),
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
            same_rate(config.tsc_khz, host_tsc_khz())
            or (config.accelerator == "kvm" and kvm.scales_tsc()),
        ),
    ):
        if not fits:
            raise Incompatible(
                f"snapshot {snapshot.manifest.tag} was made with {what} {theirs}, this host has "
                f"{ours}; its device state cannot be loaded here: use a host like that, or build "
                "it anew"
            )


def _same_series(version: str) -> bool:
    """microvm is not a versioned machine type: states fit within a major.minor alone."""
    return qemu_series(version) == qemu_series(qemu_version())
