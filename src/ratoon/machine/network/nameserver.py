"""The nameserver that this host asks, and so its guests do."""

from __future__ import annotations

import socket
from contextlib import closing
from ipaddress import AddressValueError, IPv4Address
from pathlib import Path

from ratoon.machine.network.blocks import NEVER

RESOLV_CONF = Path("/etc/resolv.conf")
#: Seconds between looks at it.
INTERVAL = 2.0


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


def is_out_of_reach(nameserver: IPv4Address) -> bool:
    """Whether no policy lets anybody get to it."""
    return _is_own(nameserver) or any(nameserver in block for block in NEVER)


def _is_own(address: IPv4Address) -> bool:
    """Whether it is one of this host's: only to those can a socket be bound."""
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return False
        return True
