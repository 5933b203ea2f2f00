"""What `doctor` is told about networks."""

from __future__ import annotations

import os
import shutil
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.machine.network import fitness, pasta
from ratoon.machine.network.fitness import firewall_trouble, resolver_trouble
from ratoon.machine.network.nameserver import first_resolver


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("nameserver 192.0.2.53\n", "192.0.2.53"),
        ("search example.org\nnameserver 2001:db8::53\nnameserver\t192.0.2.53 # x\n", "192.0.2.53"),
        ("nameserver 192.0.2.53\nnameserver 192.0.2.54\n", "192.0.2.53"),
        ("#nameserver 192.0.2.53\n; nameserver 192.0.2.53\nnameserver\n", None),
        ("nameserver fe80::1%eth0\noptions ndots:2", None),
    ],
)
def test_the_resolver_that_qemu_asks(text: str, expected: str | None) -> None:
    assert first_resolver(text) == (expected and IPv4Address(expected))


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    first_resolver(text)


@pytest.fixture
def resolv_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "resolv.conf"
    monkeypatch.setattr(fitness, "RESOLV_CONF", path)
    return path


def test_a_resolver_elsewhere_is_fine(resolv_conf: Path) -> None:
    resolv_conf.write_text("nameserver 198.51.100.53\n")
    assert resolver_trouble() is None


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.53", "169.254.169.254"])
def test_one_that_no_policy_lets_through_is_told(resolv_conf: Path, address: str) -> None:
    resolv_conf.write_text(f"nameserver {address}\n")
    trouble = resolver_trouble()
    assert trouble is not None
    assert f"the nameserver {address} of {resolv_conf} is out of reach" in trouble


def test_no_resolver_at_all_is_told(resolv_conf: Path) -> None:
    assert "cannot be read" in (resolver_trouble() or "")
    resolv_conf.write_text("nameserver ::1\n")
    assert "names no IPv4 nameserver" in (resolver_trouble() or "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")
def test_this_host_can_enforce_policies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert firewall_trouble() is None
    (tmp_path / "ip").symlink_to(shutil.which("ip") or "ip")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert firewall_trouble() == "nft is not installed; `ratoon setup` says how to have it"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")
def test_where_the_network_is_not_ours_a_world_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "is_ours", lambda: False)
    monkeypatch.setattr(pasta, "TUN", Path("/dev/net/none"))
    assert firewall_trouble() == "pasta cannot open /dev/net/none; as root: modprobe tun"
    monkeypatch.setattr(pasta, "TUN", Path("/dev/null"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, how: path != pasta.TUN and access(path, how))
    assert firewall_trouble() == "pasta cannot open /dev/null; as root: chmod 0666 /dev/null"
    monkeypatch.setenv("PATH", str(Path(shutil.which("ip") or "ip").parent / "none"))
    assert pasta.trouble() == "pasta is not installed; `ratoon setup` says how to have it"


def test_a_resolver_that_has_a_stand_in_is_fine(
    resolv_conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolv_conf.write_text("nameserver 127.0.0.53\n")
    monkeypatch.setattr(fitness, "is_ours", lambda: False)
    assert resolver_trouble() is None


def test_without_root_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(fitness, "new_namespace", refused)
    assert "take root" in (firewall_trouble() or "")
