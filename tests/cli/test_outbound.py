"""What is said about the way out of a guest, for each way in which it may be closed."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from debian_mirror import mirror
from ratoon.cli import outbound
from ratoon.cli.outbound import (
    Reach,
    Server,
    check_outbound,
    judge,
    known_servers,
    reach_of_host,
)
from ratoon.machine.guest.mirrors import named_indexes

FINE = Reach(address="192.0.2.80", connected=True, received=150_000)


@pytest.mark.parametrize(
    ("guest", "host", "state", "found", "todo"),
    [
        (FINE, FINE, "ok", "a guest reaches mirror.example: 146 KiB came", ""),
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
            "a guest does not reach mirror.example, though its host does (timed out)",
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
            "the host itself does not reach mirror.example (Name or service not known)",
            "nothing, if",
        ),
        (
            Reach(broken="refused"),
            Reach(address="192.0.2.80", connected=True, received=120),
            "warn",
            "the host itself does not reach mirror.example (120 bytes came back)",
            "nothing, if",
        ),
    ],
)
def test_the_way_out(guest: Reach, host: Reach, state: str, found: str, todo: str) -> None:
    check = judge("mirror.example", host, guest)
    assert (check.name, check.state) == ("outbound", state)
    assert found in check.found
    assert todo in check.todo


async def test_the_probe_says_what_it_met() -> None:
    """The name is reserved for ever (RFC 6761), so it is resolved nowhere."""
    nowhere = Server("nowhere.invalid", 80, "/")
    server, reach = await reach_of_host([nowhere])
    assert server == nowhere
    assert reach.unresolved
    assert not reach.connected
    assert not reach.whole


async def test_the_first_server_that_this_host_reaches() -> None:
    with mirror() as small, mirror() as large:
        for each, size in ((small, 1000), (large, 100_000)):
            each.files["dists/bookworm/InRelease"] = bytes(size)
        closed = Server("127.0.0.1", 1, "/")
        servers = [Server.of(f"{each.address}/dists/bookworm/InRelease") for each in (small, large)]
        server, reach = await reach_of_host([closed, *servers, closed])
        assert (server, reach.whole) == (servers[1], True)
        server, reach = await reach_of_host([closed, servers[0]])
        assert (server, reach.whole, reach.connected) == (closed, False, False)


async def test_a_probe_that_does_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert (await reach_of_host([Server("localhost", 80, "/")]))[1] == Reach(broken="broken")


def test_only_who_is_named_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody is built in; whole suites come first, and what is encrypted is not tried."""
    monkeypatch.delenv("RATOON_MIRROR", raising=False)
    monkeypatch.setattr(outbound, "named_indexes", partial(named_indexes, tmp_path))
    assert known_servers() == []
    (tmp_path / "sources.list").write_text(
        "deb https://safe.example/debian trixie main\n"
        "deb http://one.example/ubuntu noble-updates main\n"
        "deb http://one.example:8080/ubuntu/ noble main\n"
    )
    of_apt = [
        Server("one.example", 8080, "/ubuntu/dists/noble/InRelease"),
        Server("one.example", 80, "/ubuntu/dists/noble-updates/InRelease"),
    ]
    assert known_servers() == of_apt
    monkeypatch.setenv("RATOON_MIRROR", "http://own.example/debian")
    own = Server("own.example", 80, "/debian/dists/bookworm/InRelease")
    assert known_servers() == [own, *of_apt]


async def test_where_nobody_is_named() -> None:
    check = await check_outbound(None, [])  # type: ignore[arg-type]
    assert (check.state, check.found[:9]) == ("warn", "not tried")
    assert "RATOON_MIRROR" in check.todo
