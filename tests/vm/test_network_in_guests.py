"""What a guest reaches under each policy, from inside it; the world around it is the tests' own.

That the rules hold against whoever is beyond the guest, and rule by rule: tests/network.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm_helpers import FOR_EVER, sh, until

from network_lab import (
    HOST,
    HOST6,
    LOOPBACK,
    METADATA,
    OTHER,
    RESOLVER,
    WORLD,
    Lab,
    Service,
    address_in,
    entered,
    ip,
    nft,
    opened_lab,
    tables,
    uplinks,
)
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.network import resolver
from ratoon.machine.network.policy import NetworkPolicy

AT_HOME = [Service(address, 80) for address in (HOST, HOST6, LOOPBACK)] + [
    Service(address, 53, "udp") for address in (HOST, HOST6, LOOPBACK)
]
OUT_THERE = [
    *(Service(WORLD, 80), Service(WORLD, 443), Service(OTHER, 80)),
    *(Service(WORLD, 53, "udp"), Service(OTHER, 53, "udp")),
]
AT_THE_CLOUD = [Service(METADATA, 80), Service(METADATA, 53, "udp")]
#: Whatever of its host a guest may try: QEMU makes 127.0.0.1 of 10.0.2.2, and DNS of 10.0.2.3.
WAYS_HOME = [
    *AT_HOME,
    *AT_THE_CLOUD,
    *(Service(address, 80) for address in ("10.0.2.2", "10.0.2.3", "10.213.0.1", "fec0::2")),
    *(Service(address, 53, "udp") for address in ("10.0.2.2", "10.213.0.1", "fec0::2")),
]

#: In a guest: IPv6 as QEMU's user network has it, if it has.
GET_IPV6 = """
echo 0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6
ip address add fec0::15/64 dev eth0 nodad
ip route add default via fec0::2
"""

#: Run in a guest, with a patience and services: for each, whether it has answered.
PROBE = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def answers(service):
    address, port, protocol = service
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    try:
        with socket.socket(family, kind) as connection:
            connection.settimeout(float(sys.argv[1]))
            connection.connect((address, port))
            connection.sendall(b"hello")
            return connection.recv(100) == b"hello"
    except OSError:
        return False

services = json.loads(sys.argv[2])
with ThreadPoolExecutor(len(services)) as threads:
    print(json.dumps(list(threads.map(answers, services))))
"""


async def probe(
    sandbox: Sandbox, services: Iterable[Service], *, patience: float = FOR_EVER
) -> set[Service]:
    """Which of these answer to the guest."""
    them = list(services)
    argv = ["python3", "-c", PROBE, str(patience), json.dumps(them)]
    result = await sandbox.exec(argv, timeout=FOR_EVER)
    assert result.exit_code == 0, result
    return {each for each, answer in zip(them, json.loads(result.stdout), strict=True) if answer}


async def heard(lab: Lab, sandbox: Sandbox, services: Iterable[Service]) -> set[Service]:
    """Which of these hear of the guest, which asks for them in vain."""
    lab.heard.clear()
    assert await probe(sandbox, services, patience=1) == set()
    return set(lab.heard)


def reaching(policy: str) -> SandboxOptions:
    return SandboxOptions(network=NetworkPolicy.parse(policy))


@pytest.fixture(scope="module")
async def lab() -> AsyncIterator[Lab]:
    async with (
        opened_lab() as lab,
        lab.offering(lab.host, *AT_HOME),
        lab.offering(lab.world, *OUT_THERE, *AT_THE_CLOUD),
    ):
        yield lab


async def test_none_reaches_nothing(engine: Engine, lab: Lab) -> None:
    async with await engine.fork_one("base") as sandbox:
        assert str(sandbox.network) == "none"
        assert uplinks() == set()
        assert await heard(lab, sandbox, [*OUT_THERE, *WAYS_HOME]) == set()


async def test_outbound_reaches_the_world_and_never_the_host(engine: Engine, lab: Lab) -> None:
    async with await engine.fork_one("base", reaching("outbound")) as sandbox:
        await sh(sandbox, GET_IPV6)
        assert await probe(sandbox, OUT_THERE) == set(OUT_THERE)
        assert await heard(lab, sandbox, WAYS_HOME) == set()
        # It is the rules that keep it from there, and so this can fail.
        (uplink,) = uplinks()
        nft(f"delete table inet {uplink}")
        home = [Service(HOST, 80), Service(HOST, 53, "udp")]
        assert await probe(sandbox, home) == set(home)


async def test_a_list_reaches_what_is_listed_and_a_fork_may_have_another_policy(
    engine: Engine, lab: Lab
) -> None:
    listed = [Service(WORLD, 443), Service(OTHER, 53, "udp")]
    others = [each for each in OUT_THERE if each not in listed]
    async with await engine.fork_one("base", reaching(f"allow:{WORLD}:443,{OTHER}:53")) as listing:
        assert await probe(listing, listed) == set(listed)
        assert await heard(lab, listing, [*others, *WAYS_HOME]) == set()
        await engine.branch(listing, "listing")
        assert engine.store.get("listing").manifest.network == str(listing.network)
    async with await engine.fork_one("listing") as same:
        assert same.network == listing.network
        assert await probe(same, listed) == set(listed)
        assert await heard(lab, same, others) == set()
    async with await engine.fork_one("listing", reaching("none")) as closed:
        assert await heard(lab, closed, OUT_THERE) == set()
    async with await engine.fork_one("listing", reaching("outbound")) as opened:
        assert await probe(opened, OUT_THERE) == set(OUT_THERE)


# Among sandboxes ------------------------------------------------------------------------------

#: Speaks to the world, so that QEMU has a socket for it, and hears whoever answers.
LISTENER = f"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as talk:
    talk.sendto(b"hello, world", ("{WORLD}", 53))
    while True:
        print(talk.recvfrom(100)[0].decode(), flush=True)
"""


async def test_sandboxes_that_share_a_policy_do_not_meet(engine: Engine, lab: Lab) -> None:
    """QEMU's sockets for a guest's datagrams take them from anybody."""
    policy = reaching(f"allow:{WORLD}:53")
    async with (
        await engine.fork_one("base", policy) as one,
        await engine.fork_one("base", policy) as other,
    ):
        listen = "cat >/tmp/listen; setsid python3 /tmp/listen >/tmp/said 2>&1 &"
        await sh(one, listen, stdin=LISTENER.encode())
        await sh(one, "until grep -q world /tmp/said; do sleep 0.1; done")
        assert namespace_id(one) == namespace_id(other)
        with namespace_of(one) as namespace:
            addresses = address_in(namespace), "10.0.2.2"
            ways = [Service(each, port, "udp") for each in addresses for port in udp_ports(one)]
            assert ways
            assert await probe(other, ways, patience=1) == set()
            assert await sh(one, "cat /tmp/said") == "hello, world\n"
            # But for the rules it would have heard.
            with entered(namespace):
                nft("delete table inet ratoon")
                ip("link set lo up")
        async with asyncio.timeout(FOR_EVER):
            while "hello\n" not in await sh(one, "cat /tmp/said"):
                await probe(other, ways, patience=1)


def namespace_id(sandbox: Sandbox) -> int:
    return Path(f"/proc/{sandbox.pid}/ns/net").stat().st_ino


@contextmanager
def namespace_of(sandbox: Sandbox) -> Iterator[int]:
    fd = os.open(f"/proc/{sandbox.pid}/ns/net", os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def udp_ports(sandbox: Sandbox) -> list[int]:
    """The ports of all sockets for datagrams in its namespace."""
    lines = Path(f"/proc/{sandbox.pid}/net/udp").read_text().splitlines()[1:]
    return [int(line.split()[1].partition(":")[2], 16) for line in lines]


# Names ----------------------------------------------------------------------------------------

RESOLVE = "RES_OPTIONS='{}' python3 -c 'import socket; print(socket.gethostbyname(\"a.test\"))'"


def answered(question: bytes) -> bytes:
    """What a nameserver says to a question for an address: 192.0.2.77 (RFC 1035)."""
    end = question.index(0, 12) + 5
    header = question[:2] + bytes.fromhex("8180 0001 0001 0000 0000")
    return header + question[12:end] + bytes.fromhex("c00c 0001 0001 0000003c 0004 c000024d")


@pytest.fixture
async def asked(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[list[bytes]]:
    """What a nameserver in the world was asked; it is the one that the host is said to have."""
    (tmp_path / "resolv.conf").write_text(f"nameserver {RESOLVER}\n")
    monkeypatch.setattr(resolver, "RESOLV_CONF", tmp_path / "resolv.conf")
    questions: list[bytes] = []
    loop = asyncio.get_running_loop()
    with entered(lab.world):
        server = Service(RESOLVER, 53, "udp").socket()
    with server:
        server.bind((RESOLVER, 53))

        def answer() -> None:
            question, sender = server.recvfrom(4096)
            questions.append(question)
            server.sendto(answered(question), sender)

        loop.add_reader(server, answer)
        try:
            yield questions
        finally:
            loop.remove_reader(server)


@pytest.mark.parametrize("policy", ["outbound", f"allow:{RESOLVER}:53"])
async def test_names_are_resolved_where_the_hosts_resolver_may_be_asked(
    engine: Engine, asked: list[bytes], policy: str
) -> None:
    async with await engine.fork_one("base", reaching(policy)) as sandbox:
        found = await sh(sandbox, RESOLVE.format("timeout:30"))
        assert found == "192.0.2.77\n"
        assert asked


@pytest.mark.parametrize("policy", ["none", f"allow:{RESOLVER}:443,{WORLD}:*"])
async def test_names_are_not_resolved_where_it_may_not(
    engine: Engine, asked: list[bytes], policy: str
) -> None:
    async with await engine.fork_one("base", reaching(policy)) as sandbox:
        script = RESOLVE.format("timeout:1 attempts:1")
        result = await sandbox.exec(["sh", "-c", script], timeout=FOR_EVER)
        assert b"socket.gaierror" in result.stderr
        assert asked == []


# Its end --------------------------------------------------------------------------------------

OWNER = """
import asyncio, signal, sys
from pathlib import Path
from ratoon.machine.network import resolver
from ratoon.machine.network.policy import OUTBOUND
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions

async def main():
    async with Engine.open(Path(sys.argv[1])) as engine:
        await engine.fork_one("base", SandboxOptions(network=OUTBOUND))
        print("ready", flush=True)
        signal.pause()

asyncio.run(main())
"""


async def test_nothing_is_left_of_a_killed_owners_network(home: Path, lab: Lab) -> None:
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER, str(home)), stdout=asyncio.subprocess.PIPE
    )
    assert owner.stdout
    assert await owner.stdout.readline() == b"ready\n"
    assert uplinks() == tables() == {"rtn0"}
    owner.kill()
    await owner.wait()
    await until(lambda: not uplinks(), "the end of the namespace")
    async with Engine.open(home):
        assert tables() == set()


async def test_an_uplink_ends_with_the_last_of_its_sandboxes(engine: Engine, lab: Lab) -> None:
    async with await engine.fork_one("base", reaching("outbound")):
        async with await engine.fork_one("base", reaching("outbound")) as other:
            assert uplinks() == tables() == {"rtn0"}
            await engine.standby(other)
            assert uplinks() == tables() == {"rtn0"}
        assert uplinks() == tables() == {"rtn0"}
    assert uplinks() == tables() == set()


async def test_a_policy_holds_through_standby_and_reset(engine: Engine, lab: Lab) -> None:
    listed, other = Service(WORLD, 443), Service(WORLD, 80)
    async with await engine.fork_one("base", reaching(f"allow:{WORLD}:443")) as sandbox:
        await engine.standby(sandbox)
        assert uplinks() == tables() == set()
        for again in (engine.resume, engine.reset):
            await again(sandbox)
            assert await probe(sandbox, [listed]) == {listed}
            assert await heard(lab, sandbox, [other]) == set()


# Connections that a fork or a resume has not --------------------------------------------------

#: Connects, says so, and then who reads and who writes say when they hear of an error. By the
#: loopback there is a connection too, and somebody who connects for as long as it takes.
CONNECTED = """
import os, socket, sys, threading, time
def note(name, text):
    with open(f"/root/{name}.new", "w") as file:
        file.write(text)
    os.rename(f"/root/{name}.new", f"/root/{name}")
def reads(name, connection):
    try:
        note(name, f"read {connection.recv(100)}")
    except OSError as error:
        note(name, error.strerror)
def writes(name, connection):
    try:
        while True:
            connection.sendall(b"x" * 65536)
    except OSError as error:
        note(name, error.strerror)
world = sys.argv[1]
server = socket.create_server(("127.0.0.1", 7000))
local = socket.create_connection(("127.0.0.1", 7000))
peer, _ = server.accept()
outside = socket.create_connection((world, 80))
mapped = socket.socket(socket.AF_INET6)
mapped.connect((f"::ffff:{world}", 80))
written = socket.create_connection((world, 443))
for name, task, connection in [
    ("reader", reads, outside), ("mapped", reads, mapped), ("writer", writes, written),
    ("local", reads, local),
]:
    threading.Thread(target=task, args=(name, connection)).start()
note("ready", "")
while not os.path.exists("/root/finish"):
    time.sleep(0.1)
peer.sendall(b"local")
outside.sendall(b"world")
"""
WAIT_FOR = "cd /root; until [ -e {0} ]; do sleep 0.05; done; cat {0}"
ABORTED = "Software caused connection abort"
#: Whom the writer writes to knows nothing of the connection, and may say so first.
RESET = "Connection reset by peer"


async def connected(sandbox: Sandbox) -> None:
    await sh(sandbox, "cat >/root/connected", stdin=CONNECTED.encode())
    start = f"setsid python3 /root/connected {WORLD} >/dev/null 2>&1 </dev/null &"
    await sh(sandbox, start + WAIT_FOR.format("ready"))


async def assert_cut(sandbox: Sandbox) -> None:
    """Who waits for the outside was told; what is in the guest goes on."""
    for name in ("reader", "mapped"):
        assert await sh(sandbox, WAIT_FOR.format(name)) == ABORTED
    assert await sh(sandbox, WAIT_FOR.format("writer")) in (ABORTED, RESET)
    assert await sh(sandbox, "ls /root/local 2>&1 | grep -c 'No such'") == "1\n"
    assert await sh(sandbox, "touch /root/finish;" + WAIT_FOR.format("local")) == "read b'local'"


async def test_connections_that_a_fork_or_a_resume_cuts_end_with_an_error(
    engine: Engine, lab: Lab
) -> None:
    options = SandboxOptions(network=NetworkPolicy.parse("outbound"))
    async with await engine.fork_one("base", options) as source:
        await connected(source)
        await engine.branch(source, "connected")
        for network in (None, NetworkPolicy.parse("none")):
            async with await engine.fork_one("connected", SandboxOptions(network=network)) as fork:
                await assert_cut(fork)
        async with await engine.fork_one("connected") as again:
            await engine.branch(again, "connected-again")
            await assert_cut(again)
        finish = "touch /root/finish;" + WAIT_FOR.format("reader")
        assert await sh(source, finish) == "read b'world'", "its own connections are there still"
    async with await engine.fork_one("base", options) as sandbox:
        await connected(sandbox)
        await engine.standby(sandbox)
        await engine.resume(sandbox)
        await assert_cut(sandbox)
