"""What `ratoon doctor` finds out by running guests: accelerator, boot, fork, clock, network."""

from __future__ import annotations

import asyncio
import tempfile
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path

from ratoon import paths
from ratoon.artifacts import Progress
from ratoon.cli.outbound import check_outbound, known_servers
from ratoon.engine.sandbox.accelerator import Probe, choose_accelerator, without_kvm
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import HostError, RatoonError
from ratoon.jail.layers import layers_of
from ratoon.jail.steps import STEPS
from ratoon.jail.user_namespace import free_ids
from ratoon.machine.guest.build import build_guest
from ratoon.machine.host.checks import Check, check_clock, check_jail
from ratoon.machine.network.policy import OUTBOUND
from ratoon.machine.vmm import kvm
from ratoon.machine.vmm.bare import bare_launch
from ratoon.machine.vmm.cpu import EMULATED
from ratoon.machine.vmm.driver import Hardware
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.machine.vmm.tsc import host_tsc_khz
from ratoon.units import MIB

TAG = "doctor"
RAM_BYTES = 256 * MIB
PROBE_RAM_BYTES = 16 * MIB


def accelerator_at_a_glance() -> Check:
    """Without a boot, no more can be said than whether KVM's device opens."""
    if kvm.opens():
        return Check("accelerator", "ok", f"{kvm.DEVICE} opens; --quick does not try a guest on it")
    return check_accelerator(without_kvm())


def check_accelerator(probe: Probe) -> Check:
    rate = f"TSC {host_tsc_khz() // 1000} MHz"
    if probe.accelerator == "kvm":
        return Check("accelerator", "ok", f"KVM, {rate}: {probe.reason}")
    return Check(
        "accelerator",
        "warn",
        f"TCG, {rate}: guests are emulated, which is slow, as {probe.reason}",
        f"{_way_to_kvm()}; till then run what you trust: an emulator is no security boundary",
        textwrap.shorten(probe.details, 600),
    )


def _way_to_kvm() -> str:
    if not kvm.DEVICE.exists():
        return (
            "turn on virtualization in the firmware, or nested virtualization for this host where "
            "it is a virtual machine itself"
        )
    if not kvm.opens():
        return f"join the group that may open {kvm.DEVICE}, mostly `kvm`"
    return (
        "this host's virtualization is not complete, as on many virtual machines: take bare metal, "
        "or a machine with nested virtualization"
    )


async def jail_check() -> Check:
    """What confines a machine here, read off one that is started for it and has no guest."""
    try:
        with bare_launch(Hardware(PROBE_RAM_BYTES, 1, "tcg", EMULATED)) as launch:
            machine = await QemuMachine.start(launch)
            try:
                layers = layers_of(machine.pid)
            finally:
                await machine.kill()
    except RatoonError as error:
        return Check("jail", "bad", str(error), "nothing runs here until that is mended")
    missing = [why for step in STEPS if (why := step.missing())]
    return check_jail(layers, missing, one_id=not free_ids())


async def guest_checks(progress: Progress) -> AsyncIterator[Check]:
    """Each as soon as it is known; takes some seconds, the first time a minute or two."""
    try:
        guest = await asyncio.to_thread(build_guest, progress)
        yield check_accelerator(await choose_accelerator(guest, progress))
        paths.cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=paths.cache()) as name:
            async with Engine.open(Path(name)) as engine:
                built = await engine.bases.from_image(
                    "debian", TAG, ram_bytes=RAM_BYTES, progress=progress
                )
                async for check in _check_forks(engine, built.stages["boot"], progress):
                    yield check
    except RatoonError as error:
        yield Check("guest", "bad", str(error), "nothing can be forked here until that is mended")


async def _check_forks(engine: Engine, boot_ms: float, progress: Progress) -> AsyncIterator[Check]:
    async with await engine.fork_one(TAG) as sandbox:
        times = f"booted in {boot_ms / 1000:.1f} s, forked in {sandbox.fork_ms / 1000:.2f} s"
        yield Check("guest", "ok", times)
        yield check_clock(await skew_of(sandbox))
    progress("trying what a guest with an open network reaches")
    try:
        sandbox = await engine.fork_one(TAG, SandboxOptions(network=OUTBOUND))
    except HostError as error:
        yield Check("outbound", "warn", str(error), "sandboxes have no network here")
        return
    async with sandbox:
        yield await check_outbound(sandbox, known_servers())


async def skew_of(sandbox: Sandbox) -> float:
    """By how many seconds its clock is ahead, as far as the time that asking takes leaves open."""
    before = time.time()
    answer = await sandbox.exec(["date", "+%s.%N"], timeout=60)
    after = time.time()
    guest = float(answer.stdout)
    return min(guest - before, 0.0) or max(guest - after, 0.0)
