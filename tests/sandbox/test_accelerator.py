"""KVM is believed once it has booted the guest, and the answer is kept."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from ratoon.engine.sandbox import accelerator
from ratoon.engine.sandbox.accelerator import KvmGate, Probe, choose_accelerator, choose_cpu
from ratoon.errors import BootTimeout, HostError, Incompatible, InvalidInput, MachineDied
from ratoon.machine.guest.build import Guest
from ratoon.machine.vmm import kvm
from ratoon.machine.vmm.cpu import EMULATED, LEVELS, Settled
from ratoon.machine.vmm.driver import Boot, Launch
from small_snapshots import MACHINE

GUEST = Guest(Path("/guest/vmlinuz"), "0a" * 32, Path("/guest/initramfs"), "0b" * 32)
WORKS = Probe(accelerator="kvm", cpu="base,sse=on", reason="it booted the guest's kernel")


class Prober:
    """Stands in for the boot of a guest, and counts."""

    def __init__(self) -> None:
        self.answers = [WORKS]
        self.asked: list[Guest] = []

    async def __call__(self, guest: Guest) -> Probe:
        self.asked.append(guest)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


@pytest.fixture
def prober(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prober:
    """A host with a /dev/kvm, a cache of its own, and a probe that boots nothing."""
    prober = Prober()
    (tmp_path / "kvm").touch()
    monkeypatch.setenv("RATOON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(kvm, "MODULES", tmp_path / "module")
    monkeypatch.setattr(accelerator, "qemu_version", lambda: "10.0.2")
    monkeypatch.setattr(accelerator, "_probe", prober)
    return prober


def answers(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "accelerators").iterdir())


async def test_without_the_device_there_is_nothing_to_probe(
    prober: Prober, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "missing")
    probe = await choose_accelerator(GUEST)
    assert (probe.accelerator, prober.asked) == ("tcg", [])
    assert "missing cannot be opened" in probe.reason
    assert not (tmp_path / "cache").exists()


async def test_the_answer_is_kept(prober: Prober) -> None:
    said: list[str] = []
    assert await choose_accelerator(GUEST, said.append) == WORKS
    assert len(said) == 2
    assert await choose_accelerator(GUEST, said.append) == WORKS
    assert len(said) == 2
    assert prober.asked == [GUEST]


async def test_a_no_is_kept_too(prober: Prober) -> None:
    no = Probe(accelerator="tcg", cpu=EMULATED, reason="KVM did not boot the guest's kernel")
    prober.answers = [no, WORKS]
    for _ in range(2):
        assert await choose_accelerator(GUEST) == no


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"\xff", b"[" * 100_000, b'{"accelerator": "hvf", "reason": ""}'],
)
async def test_an_answer_that_cannot_be_read_is_asked_for_again(
    prober: Prober, tmp_path: Path, content: bytes
) -> None:
    await choose_accelerator(GUEST)
    (answer,) = answers(tmp_path)
    answer.write_bytes(content)
    assert await choose_accelerator(GUEST) == WORKS
    assert len(prober.asked) == 2
    assert await choose_accelerator(GUEST) == WORKS
    assert len(prober.asked) == 2


async def test_another_kernel_initramfs_or_qemu_is_probed_anew(
    prober: Prober, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await choose_accelerator(GUEST)
    await choose_accelerator(replace(GUEST, kernel_digest="0c" * 32))
    await choose_accelerator(replace(GUEST, initramfs_digest="0c" * 32))
    monkeypatch.setattr(accelerator, "qemu_version", lambda: "10.0.3")
    await choose_accelerator(GUEST)
    assert len(prober.asked) == len(answers(tmp_path)) == 4


async def test_a_no_of_the_moment_is_asked_again_later(
    prober: Prober, monkeypatch: pytest.MonkeyPatch
) -> None:
    no = Probe(accelerator="tcg", cpu=EMULATED, reason="no memory", until=time.time() + 1000)
    prober.answers = [no, WORKS]
    assert await choose_accelerator(GUEST) == await choose_accelerator(GUEST) == no
    monkeypatch.setattr(time, "time", lambda: no.until + 1 if no.until else 0)
    assert await choose_accelerator(GUEST) == WORKS


async def test_other_modules_or_settings_of_kvm_are_probed_anew(
    prober: Prober, tmp_path: Path
) -> None:
    parameters = tmp_path / "module" / "kvm" / "parameters"
    parameters.mkdir(parents=True)
    for ignores in ("N", "N", "Y"):
        (parameters / "ignore_msrs").write_text(f"{ignores}\n")
        await choose_accelerator(GUEST)
    assert len(prober.asked) == 2
    (tmp_path / "module" / "kvm_intel").mkdir()
    await choose_accelerator(GUEST)
    (tmp_path / "module" / "kvm").rename(tmp_path / "unloaded")
    (tmp_path / "module" / "kvm" / "parameters").mkdir(parents=True)
    (tmp_path / "module" / "kvm" / "parameters" / "ignore_msrs").write_text("Y\n")
    await choose_accelerator(GUEST)
    assert len(prober.asked) == 4


# What the probe does ----------------------------------------------------------------------------


class Trials:
    """Stands in for what boots guests; each boot of an accelerator has an outcome, in turn.

    An outcome is an error, or how many seconds it takes on the clock of this place.
    """

    def __init__(self, **outcomes: list[float | Exception]) -> None:
        self.masked: tuple[str, ...] = ("arch-capabilities (MSR 0x10a refused)",)
        self.limit: float | None = None
        self.launches: list[Launch] = []
        self._outcomes = outcomes
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now

    async def settle(self, model: str) -> Settled:
        return Settled(f"base,as-{model}", self.masked)

    async def boot(self, launch: Launch, **_: Any) -> Any:
        assert launch.memory.stat().st_size == launch.hardware.ram_bytes
        assert launch.overlay.exists()
        self.launches.append(launch)
        outcome = self._outcomes[launch.hardware.accelerator].pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        self._now += outcome
        if self.limit is not None and outcome > self.limit:
            raise TimeoutError
        return Mock(channel=Mock(), machine=Mock(kill=AsyncMock()))

    @asynccontextmanager
    async def timeout(self, limit: float | None) -> AsyncIterator[None]:
        self.limit = limit
        yield

    async def ask(self, monkeypatch: pytest.MonkeyPatch) -> Probe:
        boot = Boot(GUEST.kernel, GUEST.initramfs, "")
        monkeypatch.setattr(accelerator, "boot", self.boot)
        monkeypatch.setattr(accelerator, "boot_from", lambda guest, _: boot)
        monkeypatch.setattr(accelerator, "settle_here", self.settle)
        monkeypatch.setattr(accelerator, "asyncio", Mock(timeout=self.timeout))
        monkeypatch.setattr(accelerator, "time", Mock(monotonic=self.monotonic, time=lambda: 1e9))
        probe = await accelerator._probe(GUEST)
        assert not any(launch.memory.parent.exists() for launch in self.launches)
        return probe


async def test_a_guest_that_boots_and_what_it_went_without(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(kvm=[3])
    probe = await trials.ask(monkeypatch)
    assert (probe.accelerator, probe.cpu, probe.until) == ("kvm", trials_cpu(trials), None)
    assert probe.reason == (
        "it booted the guest's kernel, without arch-capabilities (MSR 0x10a refused)"
    )
    trials.masked = ()
    trials._outcomes["kvm"].append(3)
    assert (await trials.ask(monkeypatch)).reason == "it booted the guest's kernel"


def trials_cpu(trials: Trials) -> str:
    (cpu,) = {launch.hardware.cpu for launch in trials.launches}
    assert cpu.startswith("base,as-host,")
    return cpu


async def test_one_that_emulation_boots_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(kvm=[500], tcg=[4])
    probe = await trials.ask(monkeypatch)
    assert (probe.accelerator, probe.cpu, probe.until) == ("tcg", EMULATED, None)
    assert probe.reason == (
        "KVM is slower than emulation here: it had not booted the guest after 20 s, for which the "
        "emulator took 4 s"
    )


async def test_on_a_loaded_host_kvm_has_as_long_as_emulation_thrice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (await Trials(kvm=[35, 35], tcg=[15]).ask(monkeypatch)).accelerator == "kvm"
    for second in (50, BootTimeout("it said nothing for 30 s")):
        probe = await Trials(kvm=[50, second], tcg=[15]).ask(monkeypatch)
        assert "after 45 s, for which the emulator took 15 s" in probe.reason
        assert probe.until is None


@pytest.mark.parametrize(
    ("failure", "lasts"),
    [
        (MachineDied("the machine died", "KVM internal error\nCode=?? ??"), True),
        (MachineDied("the machine died", "kvm.c: kvm_buf_set_msrs: Assertion failed"), True),
        (MachineDied("the machine died", "", "it was killed, for want of memory"), False),
        (HostError("no room for an overlay"), False),
    ],
)
async def test_a_failure_is_a_no_and_may_be_of_the_moment(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, lasts: bool
) -> None:
    probe = await Trials(kvm=[failure]).ask(monkeypatch)
    assert (probe.accelerator, probe.cpu) == ("tcg", EMULATED)
    assert probe.reason == "KVM did not boot the guest's kernel"
    assert probe.details == str(failure)
    assert probe.until == (None if lasts else 1e9 + accelerator.EXPIRY)


async def test_a_host_too_loaded_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = await Trials(kvm=[50], tcg=[BootTimeout("it did not boot")]).ask(monkeypatch)
    assert (probe.accelerator, probe.until) == ("tcg", 1e9 + accelerator.EXPIRY)


# Processors by name -----------------------------------------------------------------------------


async def test_a_processor_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def settle(model: str) -> Settled:
        return Settled(f"base,as-{model}")

    monkeypatch.setattr(accelerator, "settle_here", settle)
    emulated = Probe(accelerator="tcg", cpu=EMULATED, reason="")
    assert await choose_cpu(None, WORKS) == WORKS.cpu
    assert await choose_cpu(None, emulated) == EMULATED
    assert await choose_cpu("x86-64-v3", emulated) == LEVELS["x86-64-v3"]
    assert await choose_cpu("x86-64-v3", WORKS) == f"base,as-{LEVELS['x86-64-v3']}"
    with pytest.raises(InvalidInput, match="no processor 'x86-64-v9'"):
        await choose_cpu("x86-64-v9", WORKS)


# What was made under KVM ------------------------------------------------------------------------

UNDER_KVM = MACHINE.model_copy(
    update={
        "accelerator": "kvm",
        "kernel_digest": GUEST.kernel_digest,
        "initramfs_digest": GUEST.initramfs_digest,
    }
)
NO = Probe(accelerator="tcg", cpu=EMULATED, reason="KVM is slower than emulation here")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Guest]:
    """The guests of Ratoon's own that were built to probe with."""
    built: list[Guest] = []

    def build() -> Guest:
        built.append(replace(GUEST, kernel_digest="0d" * 32))
        return built[-1]

    monkeypatch.setattr(accelerator, "build_guest", build)
    return built


async def test_what_was_emulated_needs_no_kvm(prober: Prober, builds: list[Guest]) -> None:
    await KvmGate().check("base", MACHINE)
    assert (prober.asked, builds) == ([], [])


async def test_what_kvm_runs(prober: Prober, builds: list[Guest]) -> None:
    await choose_accelerator(GUEST)
    await KvmGate().check("base", UNDER_KVM)
    assert builds == []


async def test_what_kvm_does_not_run_is_refused_with_the_reason_and_the_way_out(
    prober: Prober, builds: list[Guest]
) -> None:
    prober.answers = [NO]
    await choose_accelerator(GUEST)
    with pytest.raises(
        Incompatible, match=f"snapshot base was made under KVM.*: {NO.reason}; fork"
    ):
        await KvmGate().check("base", UNDER_KVM)
    assert builds == []


async def test_without_the_device_it_is_refused_too(
    prober: Prober, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "missing")
    with pytest.raises(Incompatible, match="missing cannot be opened; fork it where KVM works, or"):
        await KvmGate().check("base", UNDER_KVM)


async def test_of_a_stranger_s_guest_the_own_one_tells_once(
    prober: Prober, builds: list[Guest]
) -> None:
    prober.answers = [NO]
    gate = KvmGate()
    for _ in range(3):
        with pytest.raises(Incompatible):
            await gate.check("unpacked", UNDER_KVM)
    assert prober.asked == builds
    assert len(builds) == 1
