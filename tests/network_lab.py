"""A host of its own, with a world beyond it: network namespaces that this process has made.

While the lab is open, the thread that opened it is in its host: what it binds, starts and asks of
the network is there, and the machine that runs the tests is not touched. A socket belongs to the
namespace that it was made in, so servers out in the world run in this process too.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from ratoon.machine.network import uplink
from ratoon.machine.network.netns import new_namespace
from ratoon.syscalls import CLONE_NEWNET, setns

#: Addresses of the host, and of the world.
HOST, HOST6 = "192.0.2.2", "fd00::2"
LOOPBACK, LOOPBACK6 = "127.0.0.1", "::1"
WORLD, OTHER, WORLD6 = "198.51.100.7", "203.0.113.9", "fd02::7"
METADATA = "169.254.169.254"
RESOLVER = "198.51.100.53"

#: Seconds after which something has hung.
FOR_EVER = 60
#: Seconds for what must not arrive. What may is asked for without such haste.
PATIENCE = 0.3

HOST_SETUP = f"""
link set lo up
link add eth0 type veth peer name world netns {{world}}
address add {HOST}/24 dev eth0
address add {HOST6}/64 dev eth0 nodad
link set eth0 up
route add default via 192.0.2.1
route add {WORLD6}/128 via fd00::1
"""
WORLD_SETUP = f"""
link set lo up
address add 192.0.2.1/24 dev world
address add {WORLD}/32 dev lo
address add {OTHER}/32 dev lo
address add {METADATA}/32 dev lo
address add {RESOLVER}/32 dev lo
address add fd00::1/64 dev world nodad
address add {WORLD6}/128 dev lo nodad
link set world up
"""


@contextmanager
def entered(namespace: int) -> Iterator[None]:
    """Have the calling thread in `namespace`, and what it starts; root alone comes back from there.

    There must be no `await` in the block: other tasks would find themselves in there.
    """
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(namespace, CLONE_NEWNET)
        yield
    finally:
        setns(own, CLONE_NEWNET)
        os.close(own)


class Service(NamedTuple):
    """What somebody may offer, or want to reach."""

    address: str
    port: int
    protocol: Literal["tcp", "udp"] = "tcp"

    def __str__(self) -> str:
        return f"{self.address}:{self.port}/{self.protocol}"

    def socket(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        kind = socket.SOCK_STREAM if self.protocol == "tcp" else socket.SOCK_DGRAM
        made = socket.socket(family, kind)
        made.setblocking(False)
        return made


def services(*addresses: str) -> list[Service]:
    """What is offered at each of them: one by TCP, one by UDP."""
    return [
        service
        for address in addresses
        for service in (Service(address, 80), Service(address, 53, "udp"))
    ]


class Lab:
    """The host that we are in, and its world."""

    def __init__(self, host: int, world: int) -> None:
        #: Descriptors of their namespaces.
        self.host = host
        self.world = world
        #: What was heard, by service.
        self.heard: Counter[Service] = Counter()

    @asynccontextmanager
    async def offering(self, namespace: int, *services: Service) -> AsyncIterator[None]:
        """Echo what comes to these services of `namespace`."""
        async with AsyncExitStack() as stack:
            for service in services:
                with entered(namespace):
                    listener = service.socket()
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    listener.bind((service.address, service.port))
                offer = self._streams if service.protocol == "tcp" else self._datagrams
                await stack.enter_async_context(offer(service, listener))
            yield

    @asynccontextmanager
    async def _streams(self, service: Service, listener: socket.socket) -> AsyncIterator[None]:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.heard[service] += 1
            with suppress(ConnectionError):
                while data := await reader.read(65536):
                    writer.write(data)
            writer.close()

        server = await asyncio.start_server(echo, sock=listener)
        try:
            yield
        finally:
            server.close()

    @asynccontextmanager
    async def _datagrams(self, service: Service, listener: socket.socket) -> AsyncIterator[None]:
        def echo() -> None:
            data, address = listener.recvfrom(65536)
            self.heard[service] += 1
            with suppress(OSError):
                listener.sendto(data, address)

        loop = asyncio.get_running_loop()
        with listener:
            loop.add_reader(listener, echo)
            try:
                yield
            finally:
                loop.remove_reader(listener)


async def reaches(namespace: int | None, service: Service, *, patience: float = FOR_EVER) -> bool:
    """Whether an echo comes back to a process in `namespace`, within `patience` seconds."""
    assert namespace is not None
    loop = asyncio.get_running_loop()
    with entered(namespace):
        client = service.socket()
    with client:
        try:
            async with asyncio.timeout(patience):
                await loop.sock_connect(client, (service.address, service.port))
                await loop.sock_sendall(client, b"hello")
                return await loop.sock_recv(client, 100) == b"hello"
        except (OSError, TimeoutError):
            return False


async def reached(lab: Lab, namespace: int | None, services: Iterable[Service]) -> set[Service]:
    """Which of them a process in `namespace` is heard by; at once, or not at all."""
    assert namespace is not None
    lab.heard.clear()
    attempts = (reaches(namespace, service, patience=PATIENCE) for service in services)
    await asyncio.gather(*attempts)
    return set(lab.heard)


async def is_heard(lab: Lab, namespace: int | None, service: Service) -> bool:
    """Whether a process in `namespace` is heard, be it answered or not."""
    lab.heard.clear()
    for _ in range(int(FOR_EVER / PATIENCE)):
        await reaches(namespace, service, patience=PATIENCE)
        if lab.heard[service]:
            return True
    return False


def address_in(namespace: int) -> str:
    """The address that a process in `namespace` speaks to the world from."""
    with entered(namespace), Service(WORLD, 9, "udp").socket() as probe:
        probe.connect((WORLD, 9))
        return str(probe.getsockname()[0])


def ip(text: str) -> None:
    subprocess.run(["ip", "-batch", "-"], input=text.strip(), text=True, check=True)


def nft(text: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)


def tables() -> set[str]:
    """The firewall's tables on the host that we are in."""
    listed = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    return {line.split()[-1] for line in listed.stdout.splitlines()}


def uplinks() -> set[str]:
    return {name for name in uplink.interfaces() if name.startswith("rtn")}


def _until_local(address: str) -> None:
    """Wait for the kernel, which adds the routes of IPv6 addresses in the background."""
    end = time.monotonic() + FOR_EVER
    ask = ["ip", "-6", "route", "get", address]
    while b"local" not in subprocess.run(ask, capture_output=True, check=False).stdout:
        assert time.monotonic() < end
        time.sleep(0.01)


@asynccontextmanager
async def opened_lab() -> AsyncIterator[Lab]:
    """Be on a host of our own until the block is left; so are threads that are started in it.

    At the end there must be nothing left of any uplink.
    """
    loop = asyncio.get_running_loop()
    host, world = new_namespace(), new_namespace()
    try:
        with entered(host), ThreadPoolExecutor() as threads:
            ip(HOST_SETUP.format(world=f"/proc/{os.getpid()}/fd/{world}"))
            with entered(world):
                ip(WORLD_SETUP)
                _until_local(WORLD6)
            _until_local(HOST6)
            Path("/proc/sys/net/ipv4/ip_forward").write_text("0")
            loop.set_default_executor(threads)
            yield Lab(host, world)
            assert (uplinks(), tables()) == (set(), set())
    finally:
        loop.set_default_executor(ThreadPoolExecutor())
        os.close(host)
        os.close(world)
