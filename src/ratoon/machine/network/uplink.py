"""The way out of a namespace: a veth pair, its addresses, and the firewall at the other end.

That end is in the network of the thread that calls for it: the host's, or another world (`world`).

Engines do not know of each other, and may be killed. So the interface's name is the claim to all
that goes with its number, the addresses and the nft table: the kernel gives a name once, and takes
it back when the namespace dies. A table without its interface is litter, whoever finds it.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Self

from ratoon.artifacts import run
from ratoon.errors import HostError
from ratoon.machine.network import netns, rules
from ratoon.machine.network.netns import FORWARDING, new_namespace
from ratoon.machine.network.policy import NetworkPolicy

log = logging.getLogger(__name__)

#: Blocks for the uplinks' addresses, four to each; the first that no route of the host overlaps.
POOLS = tuple(
    IPv4Network(block)
    for block in (
        *("10.213.0.0/20", "172.29.208.0/20", "192.168.208.0/20"),
        *("100.127.208.0/20", "198.19.208.0/20"),
    )
)
UPLINKS = POOLS[0].num_addresses // 4


@dataclass(frozen=True)
class Uplink:
    """An uplink, by the name of its interface here. Its methods run programs."""

    name: str

    @classmethod
    def lay(cls, namespace: int, policy: NetworkPolicy, pool: IPv4Network) -> Self:
        """Connect `namespace` (a descriptor) to here, as `policy` allows, by addresses of `pool`.

        It is closed until its rules are there. HostError: the host lacks a program, something in
        its kernel, or room for it.
        """
        netns.inside(namespace, _disconnect)
        number = next((n for n in range(UPLINKS) if _claim(n, namespace)), None)
        if number is None:
            raise HostError(f"all {UPLINKS} uplinks that sandboxes may have are in use")
        uplink = cls(_name(number))
        try:
            uplink._open(namespace, policy, pool, number)
        except BaseException:
            uplink.remove()
            raise
        return uplink

    def _open(self, namespace: int, policy: NetworkPolicy, pool: IPv4Network, number: int) -> None:
        here, there = pool[4 * number + 1], pool[4 * number + 2]

        def open_inside() -> None:
            run(["nft", "-f", "-"], stdin=rules.inside().encode())
            _ip(
                f"address add {there}/30 dev {rules.INSIDE}",
                f"link set {rules.INSIDE} up",
                f"route add default via {here}",
            )

        run(["nft", "-f", "-"], stdin=rules.outside(self.name, there, policy).encode())
        netns.inside(namespace, open_inside)
        _forward()
        _ip(f"address add {here}/30 dev {self.name}", f"link set {self.name} up")

    def remove(self) -> None:
        """Take it away again. What cannot be done now is left to a sweep, and logged."""
        try:
            _ip(f"link set {self.name} down")
            # The name goes last: from then on all that is called like it is somebody else's.
            run(["nft", "-f", "-"], stdin=_without_table(self.name))
            _ip(f"link delete {self.name}")
        except HostError as error:
            log.warning("uplink %s was not removed: %s", self.name, error)


def sweep() -> None:
    """Remove the rules of uplinks that died with their engine; what is in use is not touched."""
    listed = json.loads(run(["nft", "-j", "list", "tables"]))["nftables"]
    names = {item["table"]["name"] for item in listed if "table" in item}
    for name in names - interfaces():
        if match := re.fullmatch(rf"{rules.PREFIX}(\d{{1,4}})", name):
            _sweep(int(match[1]))


def _sweep(number: int) -> None:
    """To remove an uplink's rules, make it ours first: nobody else can be using it then."""
    scratch = new_namespace()
    try:
        if _claim(number, scratch):
            Uplink(_name(number)).remove()
            log.info("removed the rules of uplink %s, whose owner died", _name(number))
    finally:
        os.close(scratch)


def is_connected(namespace: int) -> bool:
    """Whether it has an uplink, to whatever world."""
    return rules.INSIDE in netns.inside(namespace, interfaces)


def _disconnect() -> None:
    """Of this thread's namespace: the world that it led to is gone, or about to go."""
    if rules.INSIDE in interfaces():
        _ip(f"link delete {rules.INSIDE}")


def interfaces() -> set[str]:
    """The names of this host's network interfaces."""
    return {name for _, name in socket.if_nameindex()}


def routes() -> list[IPv4Network]:
    """Where this host has routes to, those of uplinks and the default ones left out."""
    found = json.loads(run(["ip", "-json", "-4", "route", "show", "table", "all"]))
    return [
        IPv4Network(route["dst"])
        for route in found
        if route["dst"] != "default" and not route.get("dev", "").startswith(rules.PREFIX)
    ]


def choose_pool(routes: Iterable[IPv4Network]) -> IPv4Network:
    """The first pool that overlaps no route. A route shorter than /8 is a default one in disguise.

    HostError: there is none.
    """
    specific = [route for route in routes if route.prefixlen >= 8]
    for pool in POOLS:
        if not any(pool.overlaps(route) for route in specific):
            return pool
    raise HostError(
        "no addresses are left for the uplinks of sandboxes: this host has routes into each of "
        + ", ".join(map(str, POOLS))
    )


def _name(number: int) -> str:
    return f"{rules.PREFIX}{number}"


def _claim(number: int, namespace: int) -> bool:
    """Make the veth pair of this number, its other end inside; False if the number is taken."""
    name = _name(number)
    if name in interfaces():
        return False
    there = f"netns /proc/self/fd/{namespace}"
    try:
        _ip(f"link add {name} type veth peer name {rules.INSIDE} {there}", inherited=[namespace])
    except HostError:
        if name in interfaces():  # somebody was quicker
            return False
        raise
    return True


def _forward() -> None:
    """Switch IPv4 forwarding on, for all of the host: without it nothing leaves a namespace."""
    if FORWARDING.read_text().strip() == "1":
        return
    try:
        FORWARDING.write_text("1\n")
    except OSError as error:
        raise HostError(
            f"{FORWARDING} cannot be written ({error.strerror}): sandboxes reach the network only "
            "where the host forwards; `sysctl -w net.ipv4.ip_forward=1`"
        ) from None
    log.warning("switched on net.ipv4.ip_forward: this host forwards IPv4 from now on")


def _without_table(name: str) -> bytes:
    """Deletes a table; that there is none is no error."""
    return f"table inet {name}\ndelete table inet {name}\n".encode()


def _ip(*lines: str, inherited: Collection[int] = ()) -> None:
    run(["ip", "-batch", "-"], stdin="\n".join(lines).encode(), inherited=inherited)
