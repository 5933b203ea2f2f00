"""Under the policy `none` whatever would go out fails at once; under others nothing holds it up."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable

import pytest
from vm_helpers import FOR_EVER, forget, sh

from network_lab import OTHER, WORLD, Lab, Service, opened_lab
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.network.policy import NetworkPolicy

#: Seconds that anything which goes out may take to fail, under emulation. Until QEMU's silence was
#: not waited for any more, a look-up took 20, a connection minutes.
AT_ONCE = 2
#: Tries each way out; prints how each failed, and how many milliseconds that took.
TRY = """
import json, socket, sys, time
def over_tcp(address): socket.create_connection((address, 80), timeout=60)
def over_udp(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as talk:
        talk.sendto(b"hello", (address, 53))
        talk.settimeout(60)
        talk.recv(100)
def look_up(name): socket.getaddrinfo(name, 80)
ways = [(look_up, "outside.example"), (socket.gethostbyname, "other.example")]
for address in ("192.0.2.1", "10.0.2.2", "10.0.2.3", "10.0.2.77", "2001:db8::1"):
    ways += [(over_tcp, address), (over_udp, address)]
found = []
for way, where in ways:
    began = time.monotonic()
    try:
        way(where)
        how = "it did not fail"
    except OSError as error:
        how = error.strerror
    found.append([where, how, (time.monotonic() - began) * 1000])
print(json.dumps(found))
"""
REASONS = {"Network is unreachable", "Temporary failure in name resolution"}
#: What `ip` says of the ways out, as it was before a guest without any had none.
ROUTES = (
    "default via 10.0.2.2 dev eth0 \n10.0.2.0/24 dev eth0 proto kernel scope link src 10.0.2.15 \n"
)
RESOLVERS = "nameserver 10.0.2.3\n"


async def failures(sandbox: Sandbox, user: str | None = None) -> list[tuple[str, str, float]]:
    """Where it went, how it failed, and after how many milliseconds."""
    result = await sandbox.exec(["python3", "-c", TRY], user=user, timeout=FOR_EVER * 5)
    assert result.exit_code == 0, result
    return [(where, how, ms) for where, how, ms in json.loads(result.stdout)]


async def assert_offline(sandbox: Sandbox, user: str | None = None) -> None:
    tried = await failures(sandbox, user)
    assert {how for _, how, _ in tried} == REASONS, tried
    assert all(ms < AT_ONCE * 1000 for _, _, ms in tried), tried
    assert await sh(sandbox, "ip route") == ""


async def assert_online(sandbox: Sandbox, services: Iterable[Service]) -> None:
    assert await sh(sandbox, "ip route; cat /etc/resolv.conf") == ROUTES + RESOLVERS
    for address, port, _ in services:
        ask = f"import socket; socket.create_connection(('{address}', {port}), 60).send(b'hello')"
        await sh(sandbox, f'python3 -c "{ask}"')


def reaching(policy: str) -> SandboxOptions:
    return SandboxOptions(network=NetworkPolicy.parse(policy))


SERVICES = [Service(WORLD, 80), Service(OTHER, 80)]


@pytest.fixture(scope="module")
async def lab() -> AsyncIterator[Lab]:
    async with opened_lab() as lab, lab.offering(lab.world, *SERVICES):
        yield lab


@pytest.mark.parametrize("user", [None, "nobody"])
async def test_all_that_goes_out_fails_at_once(sandbox: Sandbox, user: str | None) -> None:
    await assert_offline(sandbox, user)


async def test_it_follows_the_policy_to_and_fro(engine: Engine, lab: Lab) -> None:
    """In forks with another policy than their source, and in theirs; after resume and reset."""
    async with await engine.fork_one("base", reaching("outbound")) as opened:
        await assert_online(opened, SERVICES)
        await engine.standby(opened)
        for again in (engine.resume, engine.reset):
            await again(opened)
            await assert_online(opened, SERVICES)
        await engine.branch(opened, "opened")
    async with await engine.fork_one("opened") as same:
        await assert_online(same, SERVICES)
    async with await engine.fork_one("opened", reaching("none")) as closed:
        await assert_offline(closed)
        await engine.standby(closed)
        for again in (engine.resume, engine.reset):
            await again(closed)
            await assert_offline(closed, "nobody")
        await engine.branch(closed, "closed")
    listed = reaching(f"allow:{WORLD}:80,{OTHER}:80")
    async with await engine.fork_one("closed", listed) as listing:
        await assert_online(listing, SERVICES)


async def test_it_does_in_machines_that_waited(engine: Engine, lab: Lab) -> None:
    """In a pool they have the snapshot's policy, as a spare the sandbox's."""
    options = reaching("outbound").model_copy(update={"spare": True})
    try:
        await engine.pool.keep(engine.store.get("base"), 1)
        await engine.pool.filled()
        async with await engine.fork_one("base") as pooled:
            await assert_offline(pooled)
        async with await engine.fork_one("base", options) as sandbox:
            await engine.reset(sandbox)
            await engine.reset(sandbox)  # the first has started the spare
            await assert_online(sandbox, SERVICES)
    finally:
        await engine.pool.close()


async def test_a_base_has_a_way_out_if_it_is_made_so(engine: Engine, lab: Lab) -> None:
    outbound = NetworkPolicy.parse("outbound")
    await engine.bases.from_image("debian", "leading-out", network=outbound)
    try:
        async with await engine.fork_one("leading-out") as sandbox:
            await assert_online(sandbox, SERVICES)
        async with await engine.fork_one("leading-out", reaching("none")) as sandbox:
            await assert_offline(sandbox)
    finally:
        await engine.settle()
        forget(engine, "leading-out")


async def test_what_a_user_has_made_of_it_stays(engine: Engine, lab: Lab) -> None:
    """Nameservers and routes of one's own, whatever the policy becomes."""
    async with await engine.fork_one("base") as source:
        own = "ip link add d0 type dummy 2>/dev/null; ip route add 198.18.0.0/24 dev lo"
        await sh(source, f"{own}; echo nameserver 192.0.2.53 >/etc/resolv.conf")
        await engine.branch(source, "own")
    async with await engine.fork_one("own", reaching("outbound")) as fork:
        assert await sh(fork, "cat /etc/resolv.conf") == "nameserver 192.0.2.53\n"
        assert await sh(fork, "ip route") == f"{ROUTES}198.18.0.0/24 dev lo scope link \n"


async def test_musl_does_not_wait_for_answers_that_cannot_come(sandbox: Sandbox) -> None:
    """It does not hear of errors: the time is in the file that it reads (resolvconf.c)."""
    assert await sh(sandbox, "cat /etc/resolv.conf") == f"{RESOLVERS}options timeout:0\n"
