"""The watchdog of cold boots: a guest that hangs, or dies, is not waited for for ever."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial

import pytest
from vm_helpers import fork_of_image, leaves_nothing, sh

from ratoon.engine.sandbox import accelerator, base, boot
from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import BootTimeout, MachineDied
from ratoon.machine.guest.build import Guest, build_guest
from ratoon.machine.vmm.cpu import EMULATED
from ratoon.machine.vmm.driver import Accelerator, Boot
from ratoon.units import MIB


def boot_with(monkeypatch: pytest.MonkeyPatch, words: str, console: str = "console=ttyS0") -> None:
    """Boot with `words` at the end of the kernel's command line."""

    def changed(guest: Guest, accelerator: Accelerator) -> Boot:
        normal = boot.boot_from(guest, accelerator)
        line = normal.command_line.replace("console=ttyS0", console)
        return replace(normal, command_line=f"{line} {words}")

    monkeypatch.setattr(base, "boot_from", changed)


async def fails_to_boot(engine: Engine, expected: type[Exception]) -> str:
    with leaves_nothing(engine), pytest.raises(expected) as failure:
        await engine.bases.from_image("debian", "never", ram_bytes=256 * MIB)
    return str(failure.value)


async def test_a_kernel_that_says_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    boot_with(monkeypatch, "panic=0 rdinit=/none init=/none", console="console=null")
    monkeypatch.setattr(boot, "FIRST_LINE_TIMEOUT", 1)
    message = await fails_to_boot(engine, BootTimeout)
    assert "did not boot within 1 s" in message
    assert "(nothing)" in message
    attempts = [record.getMessage() for record in caplog.records if "attempt" in record.message]
    assert [attempt[:9] for attempt in attempts] == ["attempt 1", "attempt 2"]


async def test_a_kernel_that_hangs_after_its_first_words(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot_with(monkeypatch, "panic=0 rdinit=/none init=/none root=/dev/none")
    monkeypatch.setattr(boot, "AGENT_TIMEOUT", 8)
    monkeypatch.setattr(base, "boot", partial(boot.boot, attempts=1))
    message = await fails_to_boot(engine, BootTimeout)
    assert "did not boot within 8 s" in message
    assert "Kernel panic" in message


async def test_a_kernel_that_gives_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    boot_with(monkeypatch, "rdinit=/none init=/none root=/dev/none")
    assert "Kernel panic" in await fails_to_boot(engine, MachineDied)


async def test_what_kvm_is_tried_with_boots() -> None:
    """Else it would be KVM's fault. Its disk has nothing on it; here the emulator shows that."""
    guest = await asyncio.to_thread(build_guest)
    assert await accelerator.seconds_to_boot(guest, "tcg", EMULATED, None)


async def test_a_base_of_two_gibibytes(engine: Engine) -> None:
    """The end of which is where an address becomes negative, to firmware that takes it for one."""
    async with fork_of_image(engine, "debian", ram=2048, disk=8192) as fork:
        total = int(await sh(fork, "awk '/MemTotal/ { print $2 }' /proc/meminfo"))
        assert 1900 * 1024 < total < 2048 * 1024


async def test_a_base_of_another_size(engine: Engine) -> None:
    await engine.bases.from_image(
        "debian", "small", ram_bytes=192 * MIB, disk_bytes=8192 * MIB, vcpus=2
    )
    async with await engine.fork_one("small") as fork:
        total = int(await sh(fork, "awk '/MemTotal/ { print $2 }' /proc/meminfo"))
        assert 120 * 1024 < total < 192 * 1024
        assert await sh(fork, "nproc") == "2\n"
        await engine.branch(fork, "small-diff")
    async with await engine.fork_one("small-diff") as fork:
        assert await sh(fork, "nproc") == "2\n"
