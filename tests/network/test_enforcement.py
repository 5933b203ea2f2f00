"""What a process in a sandbox's namespace reaches under each policy.

The process is any one, with no QEMU and no guest in front of it: so this holds for a QEMU that was
taken over as well. Servers say what they have heard, lest a lost answer pass for a refusal.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from network_lab import (
    HOST,
    HOST6,
    LOOPBACK,
    LOOPBACK6,
    METADATA,
    OTHER,
    WORLD,
    WORLD6,
    Lab,
    Service,
    address_in,
    entered,
    ip,
    is_heard,
    nft,
    opened_lab,
    reached,
    reaches,
    services,
    tables,
    uplinks,
)
from ratoon.machine.network.namespaces import Namespaces
from ratoon.machine.network.policy import NONE, OUTBOUND, NetworkPolicy

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")

#: On the host, and out in the world.
AT_HOME = services(HOST, HOST6, LOOPBACK, LOOPBACK6)
OUT_THERE = [
    *(Service(address, port) for address in (WORLD, OTHER) for port in (80, 443)),
    *(Service(address, port, "udp") for address in (WORLD, OTHER) for port in (53, 443)),
]
OUT_THERE6, AT_THE_CLOUD = services(WORLD6), services(METADATA)
OFF_LIMITS = [*AT_HOME, *OUT_THERE6, *AT_THE_CLOUD]
EVERYTHING = [*OUT_THERE, *OFF_LIMITS]


@pytest.fixture(scope="module")
async def lab() -> AsyncIterator[Lab]:
    """Every service is offered all the time."""
    async with (
        opened_lab() as lab,
        lab.offering(lab.host, *AT_HOME),
        lab.offering(lab.world, *OUT_THERE, *OUT_THERE6, *AT_THE_CLOUD),
    ):
        yield lab


@pytest.fixture
async def namespaces(lab: Lab, tmp_path: Path) -> AsyncIterator[Namespaces]:
    async with Namespaces(tmp_path) as namespaces:
        yield namespaces


async def test_control_all_services_are_there(lab: Lab) -> None:
    for service in EVERYTHING:
        assert await reaches(lab.host, service), service


async def test_outbound_reaches_the_world_alone(lab: Lab, namespaces: Namespaces) -> None:
    namespace = await namespaces.acquire(OUTBOUND)
    for service in OUT_THERE:
        assert await reaches(namespace.fd, service), service
    assert await reached(lab, namespace.fd, OFF_LIMITS) == set()
    assert not namespace.restrict


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (f"allow:{WORLD}:443", [Service(WORLD, 443), Service(WORLD, 443, "udp")]),
        (f"allow:{WORLD}:80,{OTHER}:53", [Service(WORLD, 80), Service(OTHER, 53, "udp")]),
        ("allow:198.51.100.0/24:*", [each for each in OUT_THERE if each.address == WORLD]),
        ("allow:0.0.0.0/0:443", [each for each in OUT_THERE if each.port == 443]),
        ("allow:0.0.0.0/0:*", OUT_THERE),
        (f"allow:{HOST}:*", []),
        ("allow:198.51.100.8:*", []),
    ],
)
async def test_a_list_reaches_just_what_is_listed(
    lab: Lab, namespaces: Namespaces, policy: str, expected: list[Service]
) -> None:
    namespace = await namespaces.acquire(NetworkPolicy.parse(policy))
    for service in expected:
        assert await reaches(namespace.fd, service), service
    others = [each for each in EVERYTHING if each not in expected]
    assert await reached(lab, namespace.fd, others) == set()


async def test_control_without_its_rules_a_namespace_reaches_the_host(
    lab: Lab, namespaces: Namespaces
) -> None:
    """So it is the rules that keep it from there, and these tests can fail."""
    namespace = await namespaces.acquire(OUTBOUND)
    (uplink,) = uplinks()
    services = [Service(HOST, 80), Service(METADATA, 80)]
    assert await reached(lab, namespace.fd, services) == set()
    nft(f"delete table inet {uplink}")
    assert await reaches(namespace.fd, services[0])
    # From out there no answer would find back without this.
    chain = "type nat hook postrouting priority srcnat; masquerade;"
    nft(f"table inet {uplink} {{ chain postrouting {{ {chain} }}; }}")
    assert await reaches(namespace.fd, services[1])


async def test_a_refusal_comes_at_once(lab: Lab, namespaces: Namespaces) -> None:
    """Many, too: the kernel limits its ICMP messages, but not its resets."""
    namespace = await namespaces.acquire(NetworkPolicy.parse(f"allow:{WORLD}:80"))
    assert namespace.fd is not None
    loop = asyncio.get_running_loop()
    for _ in range(50):
        with entered(namespace.fd):
            client = Service(OTHER, 80).socket()
        with client, pytest.raises(ConnectionRefusedError):
            await loop.sock_connect(client, (OTHER, 80))


# Among sandboxes ------------------------------------------------------------------------------


@asynccontextmanager
async def listening(lab: Lab, namespace: int, address: str) -> AsyncIterator[list[Service]]:
    """What a QEMU might have open: its sockets for UDP take datagrams from anybody."""
    services = [Service(address, 7000), Service(address, 7000, "udp")]
    async with lab.offering(namespace, *services):
        yield services


async def test_those_that_share_a_namespace_do_not_meet(lab: Lab, namespaces: Namespaces) -> None:
    namespace = await namespaces.acquire(OUTBOUND)
    assert namespace.fd is not None
    with entered(namespace.fd):
        ip("link set lo up")  # it is not, to begin with
    async with listening(lab, namespace.fd, "0.0.0.0") as services:
        for address in (address_in(namespace.fd), LOOPBACK, "0.0.0.0"):
            ways = [each._replace(address=address) for each in services]
            assert await reached(lab, namespace.fd, ways) == set()


async def test_namespaces_do_not_meet(lab: Lab, namespaces: Namespaces, tmp_path: Path) -> None:
    """Those of one engine, nor those of two; and the host gets into none of them."""
    async with Namespaces(tmp_path) as others:
        policies = OUTBOUND, NetworkPolicy.parse("allow:0.0.0.0/0:*")
        mine = [(await namespaces.acquire(policy)).fd for policy in policies]
        fds = [fd for fd in (*mine, (await others.acquire(OUTBOUND)).fd) if fd is not None]
        async with AsyncExitStack() as stack:
            services: list[Service] = []
            for fd in fds:
                services += await stack.enter_async_context(listening(lab, fd, address_in(fd)))
            assert len(set(services)) == 6
            for client in (*fds, lab.host):
                assert await reached(lab, client, services) == set()


async def test_control_a_namespace_is_reached_without_its_rules(
    lab: Lab, namespaces: Namespaces
) -> None:
    namespace = await namespaces.acquire(OUTBOUND)
    assert namespace.fd is not None
    async with listening(lab, namespace.fd, address_in(namespace.fd)) as services:
        stream, datagrams = services
        assert await reached(lab, lab.host, services) == set()
        with entered(namespace.fd):
            nft("delete table inet ratoon")
        # It hears the host, whose own half of the rules drops what it answers.
        assert await is_heard(lab, lab.host, datagrams)
        with entered(namespace.fd):
            ip("link set lo up")
        assert await reaches(namespace.fd, stream)
        assert await reaches(namespace.fd, datagrams)


async def test_the_hosts_half_of_the_rules_keeps_them_apart_alone(
    lab: Lab, namespaces: Namespaces
) -> None:
    """Should somebody get to the half that is inside."""
    one = await namespaces.acquire(OUTBOUND)
    two = await namespaces.acquire(NetworkPolicy.parse("allow:0.0.0.0/0:*"))
    for namespace in (one, two):
        assert namespace.fd is not None
        with entered(namespace.fd):
            nft("delete table inet ratoon")
    assert one.fd is not None
    address = address_in(one.fd)
    with entered(lab.world):
        ip(f"route add {address}/32 via {HOST}")
    async with listening(lab, one.fd, address) as services:
        assert await reached(lab, two.fd, services) == set()
        assert await reached(lab, lab.world, services) == set()
    with entered(lab.world):
        ip(f"route delete {address}/32")


async def test_nothing_but_ipv4_of_its_own_address_leaves(lab: Lab, namespaces: Namespaces) -> None:
    namespace = await namespaces.acquire(OUTBOUND)
    assert namespace.fd is not None
    (uplink,) = uplinks()
    ip(f"address add fd01::1/64 dev {uplink} nodad\nlink set {uplink} address 02:00:00:00:00:01")
    Path("/proc/sys/net/ipv6/conf/all/forwarding").write_text("1")
    with entered(namespace.fd):
        nft("delete table inet ratoon")
        ip("address add fd01::2/64 dev up0 nodad\nroute add default via fd01::1")
        ip("neighbour add fd01::1 lladdr 02:00:00:00:00:01 dev up0")
        ip("address add 198.18.0.1/32 dev up0")
        ip("route add 198.51.100.0/24 via 10.213.0.1 src 198.18.0.1")
    assert address_in(namespace.fd) == "198.18.0.1"
    services = [Service(WORLD6, 53, "udp"), Service(WORLD, 53, "udp")]
    assert await reached(lab, namespace.fd, services) == set()
    nft(f"flush chain inet {uplink} leaving")
    for service in services:
        assert await is_heard(lab, namespace.fd, service)


async def test_what_the_host_redirects_to_itself_does_not_get_there(
    lab: Lab, namespaces: Namespaces
) -> None:
    namespace = await namespaces.acquire(OUTBOUND)
    (uplink,) = uplinks()
    redirect = "type nat hook prerouting priority dstnat; tcp dport 8081 redirect to :80;"
    nft(f"table inet proxy {{ chain prerouting {{ {redirect} }}; }}")
    try:
        async with lab.offering(lab.host, Service("10.213.0.1", 80)):
            proxied = Service(WORLD, 8081)
            assert await reached(lab, namespace.fd, [proxied]) == set()
            nft(f"flush chain inet {uplink} input")
            assert await reaches(namespace.fd, proxied)
    finally:
        nft("delete table inet proxy")


# The host around it ---------------------------------------------------------------------------


async def test_a_port_of_the_host_that_leads_elsewhere_is_the_hosts(
    lab: Lab, namespaces: Namespaces
) -> None:
    """As container engines publish ports: such a packet never gets to the host's input."""
    leads = f"ip daddr {HOST} tcp dport 8080 dnat ip to {WORLD}:80"
    nft(
        f"table inet engine {{ chain c {{ type nat hook prerouting priority dstnat; {leads}; }}; }}"
    )
    try:
        namespace = await namespaces.acquire(OUTBOUND)
        (uplink,) = uplinks()
        port = Service(HOST, 8080)
        assert await reached(lab, namespace.fd, [port]) == set()
        nft(f"flush chain inet {uplink} leaving")
        assert await reaches(namespace.fd, port)
        assert set(lab.heard) == {Service(WORLD, 80)}
    finally:
        nft("delete table inet engine")


async def test_a_smaller_mtu_on_the_way_out_is_told_to_both_ends(
    lab: Lab, namespaces: Namespaces
) -> None:
    loop = asyncio.get_running_loop()
    ip("link set eth0 mtu 1400")
    try:
        namespace = await namespaces.acquire(OUTBOUND)
        assert namespace.fd is not None
        with entered(lab.world):
            listener = Service(WORLD, 7001).socket()
        with entered(namespace.fd):
            client = Service(WORLD, 7001).socket()
        with listener, client:
            listener.bind((WORLD, 7001))
            listener.listen()
            await loop.sock_connect(client, (WORLD, 7001))
            server, _ = await loop.sock_accept(listener)
            with server:
                for end in (client, server):
                    assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) <= 1360
    finally:
        ip("link set eth0 mtu 1500")


async def test_forwarding_is_switched_on_when_it_is_needed(
    lab: Lab, namespaces: Namespaces, caplog: pytest.LogCaptureFixture
) -> None:
    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    forwarding.write_text("0")
    await namespaces.acquire(NONE)
    assert forwarding.read_text() == "0\n"
    await namespaces.acquire(OUTBOUND)
    assert forwarding.read_text() == "1\n"
    assert "switched on net.ipv4.ip_forward" in caplog.text
    caplog.clear()
    await namespaces.acquire(NetworkPolicy.parse(f"allow:{WORLD}:80"))
    assert "ip_forward" not in caplog.text


async def test_tables_of_others_are_not_touched(lab: Lab, tmp_path: Path) -> None:
    nft("table inet rtnothing { }; table ip rtn0 { }; table inet mine { }")
    try:
        async with Namespaces(tmp_path) as namespaces:
            await namespaces.acquire(OUTBOUND)
        assert tables() == {"rtnothing", "rtn0", "mine"}
    finally:
        nft("delete table inet rtnothing; delete table ip rtn0; delete table inet mine")
