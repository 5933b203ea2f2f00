"""What is said about the way out of a guest, for each way in which it may be closed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ratoon.cli import outbound
from ratoon.cli.outbound import Reach, judge, reach_of_host

FINE = Reach(address="192.0.2.80", connected=True, received=150_000)


@pytest.mark.parametrize(
    ("guest", "host", "state", "found", "todo"),
    [
        (FINE, FINE, "ok", "a guest reaches deb.debian.org: 146 KiB came", ""),
        (FINE, Reach(unresolved="no"), "ok", "a guest reaches", ""),
        (
            Reach(unresolved="timed out", connected=True, received=150_000),
            FINE,
            "warn",
            "resolves no names (timed out)",
            "let the nameserver",
        ),
        (
            Reach(address="192.0.2.80", broken="timed out"),
            FINE,
            "warn",
            "a guest does not reach deb.debian.org, though its host does (timed out)",
            "firewall",
        ),
        (
            Reach(address="192.0.2.80", connected=True, received=1300, broken="timed out"),
            FINE,
            "warn",
            "a guest's connections stall: 1300 bytes came (timed out)",
            "MTU",
        ),
        (
            Reach(unresolved="no answer"),
            Reach(unresolved="Name or service not known"),
            "warn",
            "the host itself does not reach deb.debian.org (Name or service not known)",
            "nothing, if",
        ),
        (
            Reach(broken="refused"),
            Reach(address="192.0.2.80", connected=True, received=120),
            "warn",
            "the host itself does not reach deb.debian.org (120 bytes came back)",
            "nothing, if",
        ),
    ],
)
def test_the_way_out(guest: Reach, host: Reach, state: str, found: str, todo: str) -> None:
    check = judge(host, guest)
    assert (check.name, check.state) == ("outbound", state)
    assert found in check.found
    assert todo in check.todo


async def test_the_probe_says_what_it_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is reserved for ever (RFC 6761), so it is resolved nowhere."""
    monkeypatch.setattr(outbound, "SERVER", "nowhere.invalid")
    reach = await reach_of_host()
    assert reach.unresolved
    assert not reach.connected
    assert not reach.whole


async def test_a_probe_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert await reach_of_host() == Reach(broken="broken")
