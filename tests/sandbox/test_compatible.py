"""May this host load that device state? If not, both sides are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ratoon.engine.sandbox import compatible
from ratoon.engine.sandbox.compatible import check_compatible
from ratoon.errors import Incompatible
from ratoon.machine.guest.shared import wire
from ratoon.machine.vmm import command, kvm
from ratoon.store.snapshot.snapshot import Snapshot
from small_snapshots import make_chain


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatible, "qemu_version", lambda: "10.0.2")
    monkeypatch.setattr(compatible, "host_tsc_khz", lambda: 2_100_000)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """A snapshot made on just this host."""
    (snapshot,) = make_chain(tmp_path, [{}])
    guest = snapshot.manifest.guest.model_copy(update={"agent_version": wire.VERSION})
    manifest = snapshot.manifest.model_copy(update={"guest": guest})
    return made_with(replace(snapshot, manifest=manifest), devices=command.DEVICES)


def made_with(snapshot: Snapshot, **machine: Any) -> Snapshot:
    config = snapshot.manifest.machine.model_copy(update=machine)
    manifest = snapshot.manifest.model_copy(update={"machine": config})
    return replace(snapshot, manifest=manifest)


@pytest.mark.parametrize(
    "machine",
    [
        {},
        {"qemu_version": "10.0.0"},
        {"qemu_version": "10.0"},
        {"tsc_khz": 2_100_900},
        {"tsc_khz": 2_099_100},
        {"vcpus": 4, "ram_bytes": 1 << 30, "cpu": "another"},
    ],
)
def test_what_fits(snapshot: Snapshot, machine: dict[str, Any]) -> None:
    check_compatible(made_with(snapshot, **machine))


@pytest.mark.parametrize(
    ("machine", "theirs", "ours"),
    [
        ({"qemu_version": "10.1.2"}, "QEMU 10.1.2", "10.0.2"),
        ({"qemu_version": "8.2.2"}, "QEMU 8.2.2", "10.0.2"),
        ({"qemu_version": "10.20.1"}, "QEMU 10.20.1", "10.0.2"),
        ({"machine": "q35"}, "machine q35", "microvm"),
        ({"devices": ("virtio-blk",)}, r"devices \('virtio-blk',\)", r"\('virtio-blk', 'virtio-s"),
        ({"devices": command.DEVICES[::-1]}, r"devices \('virtio-net", r"\('virtio-blk'"),
        ({"tsc_khz": 2_400_000}, r"TSC rate \(kHz\) 2400000", "2100000"),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_here(
    snapshot: Snapshot, machine: dict[str, Any], theirs: str, ours: str
) -> None:
    message = f"snapshot s0 was made with {theirs}.*, this host has {ours}.* build it anew"
    with pytest.raises(Incompatible, match=message):
        check_compatible(made_with(snapshot, **machine))


def test_another_protocol_of_the_agent(snapshot: Snapshot) -> None:
    guest = snapshot.manifest.guest.model_copy(update={"agent_version": 999})
    other = replace(snapshot, manifest=snapshot.manifest.model_copy(update={"guest": guest}))
    with pytest.raises(Incompatible, match=f"protocol 999, this host has {wire.VERSION};"):
        check_compatible(other)


@pytest.mark.parametrize(("accelerator", "scales"), [("kvm", False), ("tcg", True)])
def test_another_rate_that_nothing_makes_up_for(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, accelerator: str, scales: bool
) -> None:
    monkeypatch.setattr(kvm, "scales_tsc", lambda: scales)
    with pytest.raises(Incompatible, match=r"TSC rate \(kHz\) 2400000"):
        check_compatible(made_with(snapshot, accelerator=accelerator, tsc_khz=2_400_000))


def test_another_rate_where_kvm_scales_the_counter(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvm, "scales_tsc", lambda: True)
    check_compatible(made_with(snapshot, accelerator="kvm", tsc_khz=2_400_000))
