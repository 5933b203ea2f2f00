"""What `ratoon doctor` finds out by running guests, on this host."""

from __future__ import annotations

from ratoon import paths
from ratoon.cli.guest_checks import guest_checks
from ratoon.cli.outbound import known_servers, reach_of_host
from ratoon.machine.host.checks import Check


async def test_a_guest_is_booted_forked_and_asked() -> None:
    said: list[str] = []
    found: dict[str, Check] = {}
    async for check in guest_checks(said.append):
        found[check.name] = check
    assert list(found) == ["accelerator", "guest", "clock", "outbound"]
    assert found["accelerator"].state in ("ok", "warn")
    assert found["guest"].state == "ok"
    assert found["guest"].found.startswith("booted in ")
    assert found["clock"].state == "ok"
    # As this host reaches the world, or does not, so does a guest.
    servers = known_servers()
    reaches = bool(servers) and (await reach_of_host(servers))[1].whole
    assert found["outbound"].state == ("ok" if reaches else "warn"), found["outbound"]
    assert any("booting debian" in line for line in said)
    assert list(paths.cache().glob("doctor-*")) == []
