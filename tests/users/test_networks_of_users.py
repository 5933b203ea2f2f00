"""Network policies without root: what a process in a sandbox's namespace reaches, and what is left.

As tests/network/test_enforcement.py: any process, with no QEMU and no guest in front of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from network_lab import (
    FOR_EVER,
    HOST,
    HOST6,
    LOOPBACK,
    LOOPBACK6,
    METADATA,
    OTHER,
    PATIENCE,
    RESOLVER,
    WORLD,
    WORLD6,
    Lab,
    Service,
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

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")

HERE = Path(__file__).parents[1]
UID = 0x50000000 + os.getpid() % 65536
#: Other addresses of the host: a second one, and one of another interface.
SECOND, ELSEWHERE = "192.0.2.77", "192.168.77.1"
LATER = "192.168.78.1"
#: What the command lines have of those that make a world.
PASTA, KEEPER = "\0--foreground\0--quiet", "world_process"


AT_HOME = services(HOST, SECOND, ELSEWHERE, LOOPBACK, HOST6, LOOPBACK6)
OUT_THERE = services(WORLD, OTHER)
OFF_LIMITS = [*AT_HOME, *services(METADATA, WORLD6)]
EVERYTHING = [*OUT_THERE, *OFF_LIMITS]


@pytest.fixture(scope="module")
async def lab() -> AsyncIterator[Lab]:
    async with opened_lab() as lab:
        ip(
            f"address add {SECOND}/24 dev eth0\n"
            f"link add other0 type veth peer name other1\n"
            f"address add {ELSEWHERE}/24 dev other0\nlink set other0 up\nlink set other1 up"
        )
        async with (
            lab.offering(lab.host, *AT_HOME),
            lab.offering(lab.world, *OUT_THERE, *services(METADATA, WORLD6, RESOLVER)),
        ):
            yield lab


class User:
    """Whose process has namespaces, as it is told."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._descriptors: list[int] = []

    async def ask(self, *words: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(" ".join(words).encode() + b"\n")
        answer = await self._process.stdout.readline()
        return json.loads(answer)

    async def acquire(self, policy: str) -> int:
        """A descriptor of ours."""
        answer = await self.ask("acquire", policy)
        assert isinstance(answer, list), answer
        fd, _ = answer
        return self.descriptor(fd)

    def descriptor(self, fd: int) -> int:
        """The same as one of ours, for as long as this is somebody."""
        self._descriptors.append(os.open(f"/proc/{self._process.pid}/fd/{fd}", os.O_RDONLY))
        return self._descriptors[-1]

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        assert await self._process.wait() == 0

    async def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        if self._process.returncode is None:
            await self.kill()


def processes() -> list[int]:
    """The user's, also those that may not be looked into."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):
                if f"\nUid:\t{UID}\t" in (place / "status").read_text():
                    found.append(int(place.name))
    return found


def running(program: str) -> list[int]:
    """The user's processes that have this in their command lines."""
    return [pid for pid in processes() if program in Path(f"/proc/{pid}/cmdline").read_text()]


async def gone() -> None:
    """Until no process of the user is there, nor a namespace or a mount, which they alone hold."""
    async with asyncio.timeout(FOR_EVER):
        while processes():
            await asyncio.sleep(0.02)


@pytest.fixture
async def place(lab: Lab) -> AsyncIterator[Path]:
    """A directory of the user's; nothing of his is left in the end."""
    with tempfile.TemporaryDirectory(prefix="rt-") as name:
        os.chown(name, UID, UID)
        try:
            yield Path(name)
        finally:
            for pid in processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await gone()


#: Has a resolv.conf of its own, should there be one.
SETTING = """
[ ! -e "$0/resolv.conf" ] || mount --bind "$0/resolv.conf" /etc/resolv.conf
exec "$@"
"""


@asynccontextmanager
async def somebody(
    place: Path, residents: Sequence[int] = (), *, path: str | None = None
) -> AsyncIterator[User]:
    """Who has a user namespace of his own, or is in that of a resident."""
    launcher = [sys.executable, HERE / "ordinary_user.py", str(UID), place, "0", "--"]
    program = [sys.executable, HERE / "ordinary_namespaces.py", place / "run", *residents]
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "sh", "-c", SETTING),
        *map(str, [place, *launcher, *program]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "HOME": str(place), "PATH": path or os.environ["PATH"]},
    )
    user = User(process)
    try:
        yield user
        if process.returncode is None:
            await user.end()
    finally:
        await user.close()


@contextmanager
def in_world(place: Path) -> Iterator[None]:
    """Be where the user's uplinks are."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(place / "run" / "world"))
        _, (world,), _, _ = socket.recv_fds(line, 100, 1)
    try:
        with entered(world):
            yield
    finally:
        os.close(world)


def refused(place: Path) -> str:
    """What is refused of the host."""
    with in_world(place):
        listing = ["nft", "list", "set", "inet", "world", "host"]
        return subprocess.run(listing, capture_output=True, text=True, check=True).stdout


async def test_outbound_reaches_the_world_alone(lab: Lab, place: Path) -> None:
    for service in EVERYTHING:
        assert await reaches(lab.host, service), service
    async with somebody(place) as user:
        namespace = await user.acquire("outbound")
        for service in OUT_THERE:
            assert await reaches(namespace, service), service
        assert await reached(lab, namespace, OFF_LIMITS) == set()
        assert {HOST, SECOND, ELSEWHERE, "127.0.0.0/8"} < set(
            re.findall(r"[\d./]+", refused(place))
        )
        # It is the rules that keep it from there, and so this can fail.
        with in_world(place):
            nft("delete table inet world")
        for service in services(ELSEWHERE):
            assert await is_heard(lab, namespace, service), service
    await gone()
    assert not (place / "run" / "world").exists()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (f"allow:{WORLD}:80,{OTHER}:53", [Service(WORLD, 80), Service(OTHER, 53, "udp")]),
        ("allow:0.0.0.0/0:*", OUT_THERE),
        (f"allow:{HOST}:*,{SECOND}:*,{ELSEWHERE}:*", []),
    ],
)
async def test_a_list_reaches_just_what_is_listed(
    lab: Lab, place: Path, policy: str, expected: list[Service]
) -> None:
    async with somebody(place) as user:
        namespace = await user.acquire(policy)
        for service in expected:
            assert await reaches(namespace, service), service
        others = [each for each in EVERYTHING if each not in expected]
        assert await reached(lab, namespace, others) == set()


async def test_an_address_that_the_host_gets_is_refused(lab: Lab, place: Path) -> None:
    async with somebody(place) as user:
        namespace = await user.acquire("outbound")
        for _ in range(2):
            ip(f"address add {LATER}/24 dev other0")
            try:
                async with lab.offering(lab.host, *services(LATER)):
                    async with asyncio.timeout(FOR_EVER):
                        while LATER not in refused(place):
                            await asyncio.sleep(0.02)
                    assert await reached(lab, namespace, services(LATER)) == set()
            finally:
                ip(f"address delete {LATER}/24 dev other0")
            async with asyncio.timeout(FOR_EVER):
                while LATER in refused(place):
                    await asyncio.sleep(0.02)


async def test_a_nameserver_on_the_host_is_reached_as_another(lab: Lab, place: Path) -> None:
    """And it alone, by what no policy but lists keep from it."""
    local = Service("127.0.0.53", 53, "udp")
    stand_in = Service("192.0.0.53", 53, "udp")
    (place / "resolv.conf").write_text("nameserver 127.0.0.53\n")
    async with lab.offering(lab.host, local), somebody(place) as user:
        outbound = await user.acquire("outbound")
        said = await user.ask("resolver", "outbound")
        assert said == "nameserver 192.0.0.53\nnameserver 127.0.0.53\n"
        assert await reaches(outbound, stand_in)
        assert lab.heard[local] == 1
        assert await reached(lab, outbound, [local, Service("192.0.0.53", 80)]) == set()
        listed = await user.acquire(f"allow:{WORLD}:*")
        assert await reached(lab, listed, [stand_in]) == set()
        listed_too = await user.acquire("allow:192.0.0.53:53")
        assert await reaches(listed_too, stand_in)


async def test_a_nameserver_elsewhere_is_reached_as_itself(lab: Lab, place: Path) -> None:
    """And what it answers comes from there; then the host has another one."""
    elsewhere, local = Service(WORLD, 53, "udp"), Service("127.0.0.53", 53, "udp")
    stand_in = Service("192.0.0.53", 53, "udp")
    resolv_conf = place / "resolv.conf"
    resolv_conf.write_text(f"nameserver {WORLD}\n")
    async with lab.offering(lab.host, local), somebody(place) as user:
        outbound = await user.acquire("outbound")
        assert await user.ask("resolver", "outbound") == f"nameserver {WORLD}\n"
        assert await reaches(outbound, elsewhere)
        assert await reached(lab, outbound, [stand_in]) == set()
        resolv_conf.write_text("nameserver 127.0.0.53\n")
        async with asyncio.timeout(FOR_EVER):
            while not await reaches(outbound, stand_in, patience=PATIENCE):
                await asyncio.sleep(0.1)


# How it comes and goes ------------------------------------------------------------------------


async def test_policies_share_a_world(lab: Lab, place: Path) -> None:
    async with somebody(place) as user:
        assert running(PASTA) == []
        first = await user.ask("acquire", "outbound")
        second = await user.ask("acquire", f"allow:{WORLD}:80")
        assert (first[1], second[1]) == ("rtn0", "rtn1")
        assert len(running(PASTA)) == 1
        with in_world(place):
            assert uplinks() == {"rtn0", "rtn1"}
            assert tables() == {"rtn0", "rtn1", "world"}
        assert uplinks() == set()
        await user.ask("release", "outbound")
        with in_world(place):
            assert uplinks() == {"rtn1"}
            assert tables() == {"rtn1", "world"}
    await gone()
    assert not (place / "run" / "world").exists()


async def test_it_is_taken_over_from_a_killed_daemon(lab: Lab, place: Path) -> None:
    service, unlisted = Service(WORLD, 80), Service(OTHER, 80)
    policy = f"allow:{WORLD}:80"
    async with somebody(place) as user:
        _, uplink = await user.ask("acquire", policy)
        await user.ask("acquire", "outbound")
        resident = await user.ask("inhabit", policy)
        await user.kill()
    pastas = running(PASTA)
    async with somebody(place, [resident]) as user:
        fd, again = await user.ask("adopt", policy, str(resident), uplink)
        assert (again, running(PASTA)) == (uplink, pastas)
        namespace = user.descriptor(fd)
        assert await reaches(namespace, service)
        assert await reached(lab, namespace, [unlisted, *OFF_LIMITS]) == set()
        with in_world(place):  # what was of the policy that nobody used is gone
            assert tables() == {uplink, "world"}
        other = await user.acquire("outbound")
        assert await reaches(other, unlisted)
        os.kill(resident, signal.SIGKILL)
    await gone()
    assert not (place / "run" / "world").exists()


async def test_what_a_daemon_lets_go_goes_on(lab: Lab, place: Path) -> None:
    """While there is something in it, and no longer."""
    async with somebody(place) as user:
        fd, _ = await user.ask("acquire", "outbound")
        resident = await user.ask("inhabit", "outbound")
        namespace = user.descriptor(fd)
        await user.ask("let_go")
        await user.end()
        assert await reaches(namespace, Service(WORLD, 80))
    os.kill(resident, signal.SIGKILL)
    await gone()
    assert not (place / "run" / "world").exists()


async def test_what_nobody_takes_over_ends(lab: Lab, place: Path) -> None:
    async with somebody(place) as user:
        await user.ask("acquire", "outbound")
        await user.kill()
    await gone()
    assert not (place / "run" / "world").exists()


async def test_a_daemon_that_is_killed_while_it_makes_one(lab: Lab, place: Path) -> None:
    for delay in (0.05, 0.1, 0.2, 0.4):
        async with somebody(place) as user:
            assert await user.ask("say", "hello") == "hello"
            asking = asyncio.create_task(user.ask("acquire", "outbound"))
            await asyncio.sleep(delay)
            await user.kill()
            await asyncio.gather(asking, return_exceptions=True)
        await gone()
    async with somebody(place) as user:
        namespace = await user.acquire("outbound")
        assert await reaches(namespace, Service(WORLD, 80))


@pytest.mark.parametrize("victim", [PASTA, KEEPER], ids=["pasta", "keeper"])
async def test_what_is_killed_of_it_is_made_anew(lab: Lab, place: Path, victim: str) -> None:
    """Pasta by what keeps the world; and that, with pasta, when somebody asks for a network."""
    service, policy = Service(WORLD, 80), f"allow:{WORLD}:80"
    async with somebody(place) as user:
        namespace = await user.acquire(policy)
        await user.ask("acquire", "outbound")
        await user.ask("release", "outbound")
        assert await reaches(namespace, service)
        for _ in range(2):
            (killed,) = running(victim)
            os.kill(killed, signal.SIGKILL)
            if victim == KEEPER:
                async with asyncio.timeout(FOR_EVER):
                    while running(PASTA):
                        await asyncio.sleep(0.02)
                await user.ask("acquire", "outbound")
            assert await is_heard(lab, namespace, service)
            assert await reached(lab, namespace, [Service(OTHER, 80), *OFF_LIMITS]) == set()
    await gone()
    assert not (place / "run" / "world").exists()


async def test_what_was_killed_with_the_daemon_is_made_anew(lab: Lab, place: Path) -> None:
    service, policy = Service(WORLD, 80), f"allow:{WORLD}:80"
    async with somebody(place) as user:
        await user.ask("acquire", "outbound")
        _, uplink = await user.ask("acquire", policy)
        resident = await user.ask("inhabit", policy)
        await user.kill()
    for pid in processes():
        if pid != resident:
            os.kill(pid, signal.SIGKILL)
    async with somebody(place, [resident]) as user:
        fd, _ = await user.ask("adopt", policy, str(resident), uplink)
        namespace = user.descriptor(fd)
        assert await reaches(namespace, service)
        assert await reached(lab, namespace, [Service(OTHER, 80), *OFF_LIMITS]) == set()
        os.kill(resident, signal.SIGKILL)
    await gone()
    assert not (place / "run" / "world").exists()


# Hosts that lack something --------------------------------------------------------------------

LACKS = {
    "no pasta": (None, "pasta is not installed; `ratoon setup` says how to have it"),
    "it fails": ("#!/bin/sh\necho no tap >&2; exit 1\n", "pasta does not begin: no tap"),
    "it says nothing": ("#!/bin/sh\nexit 1\n", "pasta does not begin: it says nothing"),
}


@pytest.mark.parametrize("lack", LACKS)
async def test_what_is_missing_is_said(lab: Lab, place: Path, lack: str) -> None:
    script, said = LACKS[lack]
    programs = place / "programs"
    programs.mkdir()
    for name in ("ip", "nft", "mount", "sh", "unshare"):
        (programs / name).symlink_to(shutil.which(name) or name)
    if script:
        (programs / "pasta").write_text(script)
        (programs / "pasta").chmod(0o755)
    path = str(programs) if script is None else f"{programs}:{os.environ['PATH']}"
    async with somebody(place, path=path) as user:
        for _ in range(2):
            answer = await user.ask("acquire", "outbound")
            expected = f"HostError: the network policy outbound cannot be had here: {said}"
            assert answer == expected
        assert await user.ask("acquire", "none") == [None, None]
    await gone()
    assert not (place / "run" / "world").exists()
