"""KVM is believed once it has booted the guest, and the answer is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ratoon.engine.sandbox import accelerator
from ratoon.engine.sandbox.accelerator import Probe, choose_accelerator
from ratoon.errors import BootTimeout, MachineDied
from ratoon.machine.guest.build import Guest
from ratoon.machine.vmm.driver import Boot, Launch

GUEST = Guest(Path("/guest/vmlinuz"), "0a" * 32, Path("/guest/initramfs"), "0b" * 32)
WORKS = Probe(accelerator="kvm", reason="it booted the guest's kernel")


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
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "kvm")
    monkeypatch.setattr(accelerator, "qemu_version", lambda: "10.0.2")
    monkeypatch.setattr(accelerator, "_probe", prober)
    return prober


def answers(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "accelerators").iterdir())


async def test_without_the_device_there_is_nothing_to_probe(
    prober: Prober, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "KVM_DEVICE", tmp_path / "missing")
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
    no = Probe(accelerator="tcg", reason="KVM did not boot the guest's kernel: it hung")
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


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (BootTimeout("probe did not boot within 30 s\nits console"), "did not boot within 30 s"),
        (MachineDied("the machine died", "KVM internal error"), "the machine died"),
    ],
)
async def test_a_guest_that_does_not_boot_is_a_no_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
) -> None:
    launches: list[Launch] = []

    async def boot(launch: Launch, **_: Any) -> None:
        assert launch.memory.stat().st_size == launch.hardware.ram_bytes
        assert launch.overlay.exists()
        launches.append(launch)
        raise failure

    monkeypatch.setattr(accelerator, "boot", boot)
    monkeypatch.setattr(
        accelerator, "boot_from", lambda guest, _: Boot(guest.kernel, guest.initramfs, "")
    )
    probe = await accelerator._probe(GUEST)
    assert probe.accelerator == "tcg"
    assert reason in probe.reason
    assert "\n" not in probe.reason
    assert launches[0].hardware.accelerator == "kvm"
    assert not launches[0].memory.parent.exists()
