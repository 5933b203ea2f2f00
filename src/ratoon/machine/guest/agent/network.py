"""The guest's way to other networks; under the policy `none` it has none, and knows it.

QEMU would swallow what it may not pass on, and whoever sent it would wait. So the routes are taken
away: the kernel refuses at once what would go there (ENETUNREACH). They come back where a fork has
another policy than its source.
"""

from __future__ import annotations

import socket
import struct

from .bound import BoundFile

_INTERFACE = "eth0"
ADDRESS, _GATEWAY, _NAMESERVER = "10.0.2.15", "10.0.2.2", "10.0.2.3"
_NETWORK, _PREFIX = "10.0.2.0", 24

_RESOLVERS = f"nameserver {_NAMESERVER}\n".encode()
#: musl waits for answers for as long as this says, even if no question could be sent. All others
#: take it for their least, and do not come to wait.
_NO_RESOLVERS = _RESOLVERS + b"options timeout:0\n"

# linux/rtnetlink.h, rtnetlink(7)
_NEW, _DELETE = 24, 25
_REQUEST, _CREATE, _EXCLUSIVE = 0x1, 0x400, 0x200
_HEADER = struct.Struct("=IHHII")
_ROUTE = struct.Struct("=BBBBBBBBI")
_DESTINATION, _INTERFACE_INDEX, _VIA, _SOURCE = 1, 4, 5, 7
_MAIN, _UNICAST = 254, 1
#: Who made a route, and how far it leads, as init's `ip` would say.
_BY_KERNEL, _AT_BOOT = 2, 3
_ANYWHERE, _ON_LINK = 0, 253


class Network:
    """Whether there is a way out, and the nameservers that programs ask there."""

    def __init__(self) -> None:
        """In the sandbox's root. What init has set up leads out, and is taken away for now."""
        self.online = True
        self._resolvers = BoundFile("/etc/resolv.conf")
        self._resolvers.become(_RESOLVERS)
        self.switch(False)

    def switch(self, online: bool) -> None:
        """Have a way out, or none. What users have made of routes and nameservers is theirs."""
        texts = _RESOLVERS, _NO_RESOLVERS
        after, before = texts if online else reversed(texts)
        if self._resolvers.content == before:
            self._resolvers.look()
            self._resolvers.become(after)
        self.online = online
        try:
            index = socket.if_nametoindex(_INTERFACE)
        except OSError:  # a kernel without the driver, or somebody has renamed it
            return
        kind, flags = (_NEW, _CREATE | _EXCLUSIVE) if online else (_DELETE, 0)
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
            for route in _routes(index)[:: 1 if online else -1]:
                size = _HEADER.size + len(route)
                kernel.send(_HEADER.pack(size, kind, _REQUEST | flags, 0, 0) + route)


def _routes(interface: int) -> tuple[bytes, bytes]:
    """The one to the network that the interface is in, and the default one by way of it."""
    index = _attribute(_INTERFACE_INDEX, struct.pack("=I", interface))
    network = _attribute(_DESTINATION, socket.inet_aton(_NETWORK))
    source = _attribute(_SOURCE, socket.inet_aton(ADDRESS))
    gateway = _attribute(_VIA, socket.inet_aton(_GATEWAY))
    return (
        _route(_PREFIX, _BY_KERNEL, _ON_LINK) + network + source + index,
        _route(0, _AT_BOOT, _ANYWHERE) + gateway + index,
    )


def _route(prefix: int, protocol: int, scope: int) -> bytes:
    return _ROUTE.pack(socket.AF_INET, prefix, 0, 0, _MAIN, protocol, scope, _UNICAST, 0)


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data
