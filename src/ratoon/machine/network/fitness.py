"""Whether this host can do what network policies take; for `doctor`.

Each function returns None, or for the person what is wrong and the way out.
"""

from __future__ import annotations

import os
import socket
from contextlib import closing
from ipaddress import AddressValueError, IPv4Address

from ratoon.artifacts import run
from ratoon.errors import HostError
from ratoon.machine.network import rules
from ratoon.machine.network.netns import entered, new_namespace
from ratoon.machine.network.policy import NEVER, OUTBOUND
from ratoon.machine.network.resolver import RESOLV_CONF


def firewall_trouble() -> str | None:
    """Why no policy but `none` can be enforced; tried out in a namespace that goes again."""
    try:
        scratch = new_namespace()
    except PermissionError:
        return "policies other than `none` take root, who alone can make network namespaces"
    try:
        with entered(scratch):
            run(["ip", "link", "add", "rtn0", "type", "veth", "peer", "name", rules.INSIDE])
            outside = rules.outside("rtn0", IPv4Address("192.0.2.1"), OUTBOUND)
            run(["nft", "-f", "-"], stdin=(outside + rules.inside()).encode())
    except HostError as error:
        return str(error)
    finally:
        os.close(scratch)
    return None


def resolver_trouble() -> str | None:
    """Why no name would be resolved in sandboxes, whose questions QEMU passes on to the host's."""
    try:
        resolver = first_resolver(RESOLV_CONF.read_text())
    except OSError as error:
        return f"{RESOLV_CONF} cannot be read ({error.strerror}): sandboxes resolve no names"
    if resolver is None:
        return f"{RESOLV_CONF} names no IPv4 nameserver: sandboxes resolve no names"
    if not (_is_own(resolver) or any(resolver in block for block in NEVER)):
        return None
    return (
        f"the nameserver {resolver} of {RESOLV_CONF} is out of reach under any network policy, as "
        "the host itself and link-local addresses are: sandboxes resolve no names; put another "
        "one first (of systemd-resolved: link to /run/systemd/resolve/resolv.conf)"
    )


def first_resolver(resolv_conf: str) -> IPv4Address | None:
    """The nameserver that QEMU asks: the first with an IPv4 address (resolv.conf(5))."""
    for line in resolv_conf.splitlines():
        match line.split():
            case ["nameserver", address, *_]:
                try:
                    return IPv4Address(address)
                except AddressValueError:
                    continue
    return None


def _is_own(address: IPv4Address) -> bool:
    """Whether it is one of this host's: only to those can a socket be bound."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
        return True
