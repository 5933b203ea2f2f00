"""Cold starts: a machine boots a kernel over all-zero RAM, watched, and tried again if it hangs."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from ratoon.concurrency import run_alongside
from ratoon.engine.sandbox.deaths import machine_death_as_error
from ratoon.errors import BootTimeout, GuestTimeout, MachineDied
from ratoon.machine.guest.build import Guest
from ratoon.machine.guest.channel import Channel
from ratoon.machine.vmm import command
from ratoon.machine.vmm.driver import Accelerator, Boot, Launch, Machine
from ratoon.machine.vmm.logs import log_tail
from ratoon.machine.vmm.qemu import QemuMachine
from ratoon.machine.vmm.tsc import host_tsc_khz

log = logging.getLogger(__name__)

ATTEMPTS = 3
#: Seconds until the kernel's first line: a guest whose TSC was miscalibrated hangs before it.
FIRST_LINE_TIMEOUT = 30
#: Seconds until the agent answers; ten times what a slow host needs.
AGENT_TIMEOUT = 180


@dataclass(frozen=True)
class Booted:
    """A machine whose agent has answered, and the version of its protocol."""

    machine: Machine
    channel: Channel
    agent_version: int


def kernel_words(accelerator: Accelerator) -> tuple[str, ...]:
    """What every guest's kernel is told, on any host."""
    return (
        *("console=ttyS0", "quiet", "panic=-1"),
        # A reboot, and so a panic, is a triple fault, which ends QEMU; the usual ways hang here.
        "reboot=t",
        # Pressure accounting runs at every task switch.
        "psi=0",
        # The rate of its clock is told, see `boot_from`, and not to be doubted later.
        "tsc=reliable",
        # QEMU translates code for the address it lies at. At random ones, each program that starts
        # has its libraries translated anew, which is most of what its start takes.
        *(("norandmaps",) if accelerator == "tcg" else ()),
    )


def boot_from(guest: Guest, accelerator: Accelerator) -> Boot:
    """The kernel, initramfs and command line that a guest starts with on this host."""
    words = kernel_words(accelerator)
    if accelerator == "tcg":
        # To find out by itself fails in one boot of four; under KVM it is told by kvm-clock.
        words += (f"tsc_early_khz={host_tsc_khz()}",)
    return Boot(guest.kernel, guest.initramfs, " ".join(words))


async def boot(launch: Launch, *, attempts: int = ATTEMPTS) -> Booted:
    """Start a machine with `launch.boot` and wait for its agent.

    The disk must be as new: where a boot hangs, it is tried again on the same one. Raises
    BootTimeout with the console's last lines, MachineDied.
    """
    for attempt in range(1, attempts + 1):
        try:
            return await _boot_once(launch)
        except BootTimeout as error:
            if attempt == attempts:
                raise
            log.warning("attempt %d: %s", attempt, error)
    raise AssertionError("unreachable")


async def _boot_once(launch: Launch) -> Booted:
    machine = await QemuMachine.start(launch)
    try:
        return await _greet(machine, launch)
    except BaseException:
        await machine.kill()
        raise


async def _greet(machine: Machine, launch: Launch) -> Booted:
    try:
        async with machine_death_as_error(machine, _died(launch)):
            channel = await Channel.connect(machine.agent_socket, launch.name)
            channel.begin()
            hello = channel.request("hello", timeout=AGENT_TIMEOUT)
            answer = await run_alongside(hello, _watch_boot(machine, launch))
            return Booted(machine, channel, int(answer["version"]))
    except GuestTimeout:
        raise _timeout(launch, AGENT_TIMEOUT) from None


async def _watch_boot(machine: Machine, launch: Launch) -> None:
    """Fail when the machine dies, or when its console has stayed silent for too long."""
    console = command.console_log(launch.log)
    died = asyncio.ensure_future(machine.wait_died())
    try:
        await asyncio.wait({died}, timeout=FIRST_LINE_TIMEOUT)
        if not died.done() and not console.stat().st_size:
            raise _timeout(launch, FIRST_LINE_TIMEOUT)
        raise MachineDied(_died(launch), await died, machine.cause_of_death)
    finally:
        died.cancel()


def _died(launch: Launch) -> str:
    return f"the machine of {launch.name} died while booting"


def _timeout(launch: Launch, seconds: float) -> BootTimeout:
    end = log_tail(launch.log) or "(nothing)"
    return BootTimeout(
        f"{launch.name} did not boot within {seconds:g} s; its console's end:\n{end}"
    )
