"""How namespaces come and go: shared, counted, and gone with their engine, however that ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from network_lab import (
    FOR_EVER,
    WORLD,
    Lab,
    Service,
    entered,
    ip,
    opened_lab,
    reaches,
    tables,
    uplinks,
)
from ratoon.errors import HostError
from ratoon.machine.network import namespaces as module
from ratoon.machine.network import resolver, uplink
from ratoon.machine.network.namespaces import Namespace, Namespaces
from ratoon.machine.network.policy import NONE, OUTBOUND, NetworkPolicy

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make namespaces")

LISTED = NetworkPolicy.parse("allow:198.51.100.7:443")


@pytest.fixture(scope="module")
async def lab() -> AsyncIterator[Lab]:
    async with opened_lab() as lab:
        yield lab


@pytest.fixture(autouse=True)
async def _nothing_is_left(lab: Lab) -> AsyncIterator[None]:
    before = namespace_descriptors()
    yield
    assert (uplinks(), tables()) == (set(), set())
    assert namespace_descriptors() == before


def namespace_descriptors() -> int:
    """How many descriptors of network namespaces this process holds."""
    found = 0
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found += str(fd.readlink()).startswith("net:[")
        except FileNotFoundError:  # the one that lists the others
            continue
    return found


async def test_a_policy_has_one_namespace_as_long_as_it_is_used(tmp_path: Path) -> None:
    async with Namespaces(tmp_path) as namespaces:
        one, two = await namespaces.acquire(OUTBOUND), await namespaces.acquire(OUTBOUND)
        listed = await namespaces.acquire(LISTED)
        assert one.fd == two.fd != listed.fd
        assert uplinks() == tables() == {"rtn0", "rtn1"}
        await one.release()
        await one.release()  # counts once
        assert uplinks() == tables() == {"rtn0", "rtn1"}
        await two.release()
        assert uplinks() == tables() == {"rtn1"}
        three = await namespaces.acquire(OUTBOUND)
        assert uplinks() == tables() == {"rtn0", "rtn1"}
        await listed.release()
        await three.release()
        assert uplinks() == tables() == set()


async def test_without_network_there_is_none_to_be_shared(tmp_path: Path) -> None:
    async with Namespaces(tmp_path) as namespaces:
        one = await namespaces.acquire(NONE)
        assert (one.fd, one.resolver, one.uplink) == (None, None, None)
        await one.release()
        assert uplinks() == tables() == set()


async def test_nameservers_are_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one file, also when the host's is replaced, or goes."""
    monkeypatch.setattr(resolver, "INTERVAL", 0.01)
    theirs = tmp_path / "theirs"
    monkeypatch.setattr(resolver, "RESOLV_CONF", theirs)
    async with Namespaces(tmp_path) as namespaces:
        one = await namespaces.acquire(OUTBOUND)
        assert one.resolver
        with one.resolver.open() as ours:
            for said in ("nameserver 192.0.2.1\n", "", "nameserver 192.0.2.22\n", None):
                theirs.unlink(missing_ok=True)
                if said is not None:
                    theirs.write_text(said)
                async with asyncio.timeout(FOR_EVER):
                    while os.pread(ours.fileno(), 100, 0).decode() != (said or ""):
                        await asyncio.sleep(0.01)
        await one.release()
    assert not one.resolver.exists()


async def test_many_at_once_make_one(tmp_path: Path) -> None:
    async with Namespaces(tmp_path) as namespaces:
        them = await asyncio.gather(*(namespaces.acquire(OUTBOUND) for _ in range(20)))
        assert len({each.fd for each in them}) == 1
        assert uplinks() == {"rtn0"}
        await asyncio.gather(*(each.release() for each in them))
        assert uplinks() == set()


async def test_those_still_in_use_end_with_the_engine(tmp_path: Path) -> None:
    async with Namespaces(tmp_path) as namespaces:
        one = await namespaces.acquire(OUTBOUND)
        await namespaces.acquire(LISTED)
        await namespaces.acquire(NONE)
    assert uplinks() == tables() == set()
    await one.release()  # too late, and no harm


async def test_a_caller_who_is_cancelled_leaves_none_behind(tmp_path: Path) -> None:
    async with Namespaces(tmp_path) as namespaces:
        asking = asyncio.create_task(namespaces.acquire(OUTBOUND))
        async with asyncio.timeout(FOR_EVER):
            while not uplinks():
                await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        again = await namespaces.acquire(OUTBOUND)
        assert uplinks() == {"rtn0"}
        await again.release()
        assert uplinks() == set()


async def test_engines_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    async with Namespaces(tmp_path) as ours:
        await ours.acquire(OUTBOUND)
        async with Namespaces(tmp_path) as theirs:
            await theirs.acquire(OUTBOUND)
            await theirs.acquire(LISTED)
            assert uplinks() == tables() == {"rtn0", "rtn1", "rtn2"}
        assert uplinks() == tables() == {"rtn0"}


# Killed owners --------------------------------------------------------------------------------

OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
from ratoon.machine.network.namespaces import Namespace, Namespaces
from ratoon.machine.network.policy import NONE, NetworkPolicy
from ratoon.machine.network import uplink

async def main():
    async with Namespaces(Path(sys.argv[1])) as namespaces:
        await namespaces.acquire(NONE)
        {death}
        await namespaces.acquire(NetworkPolicy.parse("allow:198.51.100.9:1"))
        print("ready", flush=True)
        signal.pause()

asyncio.run(main())
"""
DEATHS = {
    "in use": "pass",
    "before its rules": "uplink.rules.outside = lambda *arguments: os.kill(os.getpid(), 9)",
    "before it is open": "uplink._forward = lambda: os.kill(os.getpid(), 9)",
}


async def killed_owner(death: str, place: Path) -> None:
    """Run a process that owns a namespace with an uplink, until it is killed."""
    owner = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OWNER.format(death=DEATHS[death]), str(place)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert owner.stdout
    if await owner.stdout.readline():
        assert uplinks()
        owner.kill()
    assert await owner.wait() == -signal.SIGKILL


async def until_free(name: str) -> None:
    """Wait for the kernel, which takes a namespace apart in the background."""
    async with asyncio.timeout(FOR_EVER):
        while name in uplinks():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("death", DEATHS)
async def test_the_next_start_removes_what_a_killed_one_has_left(
    death: str, tmp_path: Path
) -> None:
    async with Namespaces(tmp_path) as living:
        await living.acquire(OUTBOUND)
        await killed_owner(death, tmp_path)
        await until_free("rtn1")
        left = {"in use": {"rtn0", "rtn1"}, "before its rules": {"rtn0"}}
        assert tables() == left.get(death, {"rtn0", "rtn1"})
        async with Namespaces(tmp_path):
            assert uplinks() == tables() == {"rtn0"}


async def test_rules_that_were_left_are_not_taken_over(tmp_path: Path) -> None:
    """Should the number be given anew before anybody has swept."""
    async with Namespaces(tmp_path) as namespaces:
        await killed_owner("in use", tmp_path)
        await until_free("rtn0")
        assert tables() == {"rtn0"}
        await namespaces.acquire(OUTBOUND)
        assert uplinks() == tables() == {"rtn0"}
        listing = await asyncio.create_subprocess_exec(
            *("nft", "list", "table", "inet", "rtn0"), stdout=asyncio.subprocess.PIPE
        )
        text, _ = await listing.communicate()
        assert b"198.51.100.9" not in text


async def test_a_sweep_leaves_alone_what_somebody_has_just_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between its look at the tables and the removal the name may have found a new owner."""
    async with Namespaces(tmp_path) as namespaces:
        await namespaces.acquire(OUTBOUND)
        interfaces = uplink.interfaces
        looks = iter([set[str]()])
        monkeypatch.setattr(uplink, "interfaces", lambda: next(looks, None) or interfaces())
        uplink.sweep()
        assert next(looks, None) is None
        assert uplinks() == tables() == {"rtn0"}


# Machines that outlive their engine -----------------------------------------------------------


@contextmanager
def machine(namespace: Namespace) -> Iterator[int]:
    """The process of something that runs in a namespace."""
    assert namespace.fd is not None
    with entered(namespace.fd):
        process = subprocess.Popen(["sleep", "1000"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


async def test_a_namespace_that_was_let_go_is_taken_over(lab: Lab, tmp_path: Path) -> None:
    service = Service(WORLD, 80)
    async with lab.offering(lab.world, service), Namespaces(tmp_path) as before:
        one, unused = await before.acquire(OUTBOUND), await before.acquire(LISTED)
        await unused.release()
        with machine(one) as pid:
            uplink, expected = one.uplink, uplinks()
            assert expected == {"rtn0"}
            await before.let_go()
            await one.release()  # is not its any more
            assert uplinks() == tables() == expected
            async with Namespaces(tmp_path) as after:
                adopted = await after.adopt(OUTBOUND, pid, uplink)
                other = await after.acquire(OUTBOUND)
                assert adopted.fd == other.fd
                assert (adopted.uplink, adopted.resolver) == (uplink, one.resolver)
                assert not adopted.restrict
                assert await reaches(adopted.fd, service)
                await other.release()
                assert uplinks() == tables() == expected
                await adopted.release()
                assert uplinks() == tables() == set()


async def test_a_process_that_is_gone_has_no_namespace_to_take_over(tmp_path: Path) -> None:
    async with Namespaces(tmp_path) as namespaces:
        with machine(await namespaces.acquire(OUTBOUND)) as pid:
            await namespaces.let_go()
        with pytest.raises(HostError, match=f"process {pid} has no network namespace"):
            await namespaces.adopt(OUTBOUND, pid, "rtn0")
    await until_free("rtn0")
    async with Namespaces(tmp_path):
        pass  # sweeps


# Hosts that lack something --------------------------------------------------------------------


async def test_without_root_there_is_none_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused() -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(module, "new_namespace", refused)
    async with Namespaces(tmp_path) as namespaces:
        assert (await namespaces.acquire(NONE)).restrict
        with pytest.raises(HostError, match="policy outbound cannot be had here: it takes root"):
            await namespaces.acquire(OUTBOUND)


@pytest.mark.parametrize("missing", ["nft", "ip"])
async def test_a_program_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for program in {"nft", "ip"} - {missing}:
        (tmp_path / program).symlink_to(shutil.which(program) or program)
    async with Namespaces(tmp_path) as namespaces:
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            async with Namespaces(tmp_path):
                pass  # it matters to those alone who want an uplink
            with pytest.raises(HostError, match=f"policy outbound .*: {missing} is not installed"):
                await namespaces.acquire(OUTBOUND)
    await until_free("rtn0")


async def test_what_the_kernel_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nft").write_text("#!/bin/sh\necho 'Could not process rule' >&2; exit 1\n")
    (tmp_path / "nft").chmod(0o755)
    async with Namespaces(tmp_path) as namespaces:
        with monkeypatch.context() as patch:
            patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
            with pytest.raises(HostError, match=r"cannot be had here: nft .*\sCould not pro"):
                await namespaces.acquire(OUTBOUND)
    await until_free("rtn0")


async def test_all_uplinks_are_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uplink, "UPLINKS", 1)
    async with Namespaces(tmp_path) as namespaces:
        await namespaces.acquire(OUTBOUND)
        with pytest.raises(HostError, match="all 1 uplinks that sandboxes may have are in use"):
            await namespaces.acquire(LISTED)


async def test_addresses_are_chosen_around_the_hosts_routes(lab: Lab, tmp_path: Path) -> None:
    ip("route add 10.213.0.0/16 via 192.0.2.1\nroute add 172.29.0.0/16 via 192.0.2.1")
    try:
        async with Namespaces(tmp_path) as namespaces:
            await namespaces.acquire(OUTBOUND)
            assert uplink.choose_pool(uplink.routes()).overlaps(uplink.POOLS[2])
            addresses = (await output("ip", "-4", "-brief", "address", "show", "rtn0")).split()
            assert addresses[2] == "192.168.208.1/30"
    finally:
        ip("route delete 10.213.0.0/16\nroute delete 172.29.0.0/16")


async def output(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    text, _ = await process.communicate()
    return text.decode()
