"""Connections to outside that a fork or a resume has not: their other end is in another QEMU.

Nobody would tell their programs: who reads waits for what never comes. So they are destroyed, which
ends what waits with ECONNABORTED; the loopback's, and those to containers in the guest, go on.
"""

from __future__ import annotations

import os
import re
import socket
import struct

from .network import ADDRESS

TABLES = "/proc/net/tcp", "/proc/net/tcp6"

# linux/netlink.h, linux/sock_diag.h, linux/inet_diag.h
_SOCK_DIAG = 4
_DESTROY, _REQUEST = 21, 0x1
_HEADER = struct.Struct("=IHHII")
_WHICH = struct.Struct("=BBxxI2s2s16s16sIQ")
_ALL_STATES, _NO_COOKIE = 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF

#: As the tables have it: words in the order of the host, and IPv4 within IPv6.
_OWN = b"%08X" % struct.unpack("=I", socket.inet_aton(ADDRESS))[0]
_ROW = re.compile(rb" ((?:0{16}FFFF0000)?%b):(\w{4}) (\w+):(\w{4}) (\w\w) " % _OWN)
#: TIME_WAIT, CLOSE, LISTEN, NEW_SYN_RECV (include/net/tcp_states.h): nobody waits for another end.
_WITHOUT_END = b"06", b"07", b"0A", b"0C"


class Connections:
    """Made before the agent enters the sandbox's root."""

    def __init__(self) -> None:
        self._tables = []
        for table in TABLES:
            try:
                self._tables.append(os.open(table, os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError:  # a kernel without IPv6
                pass

    def look(self) -> list[bytes]:
        """What `destroy` is to be given in a fork of this moment; mostly it is nothing."""
        found = [request for table in self._tables for request in _to_outside(_content(table))]
        if found:  # one that is not there: the kernel loads its modules now, and not in each fork
            destroy([_request(b"\0" * 4, b"\0\0", b"\0" * 4, b"\0\0")])
        return found


def destroy(connections: list[bytes]) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as kernel:
        for request in connections:
            try:
                kernel.send(request)
            except OSError:  # it cannot do that; of one that is gone it says nothing
                pass


def _to_outside(table: bytes) -> list[bytes]:
    return [
        _request(_address(own), _port(own_port), _address(other), _port(other_port))
        for own, own_port, other, other_port, state in _ROW.findall(table)
        if other != own and state not in _WITHOUT_END
    ]


def _request(own: bytes, own_port: bytes, other: bytes, other_port: bytes) -> bytes:
    """To destroy a connection: sock_diag(7)."""
    family = socket.AF_INET if len(own) == 4 else socket.AF_INET6
    ends = own_port, other_port, own, other
    which = _WHICH.pack(family, socket.IPPROTO_TCP, _ALL_STATES, *ends, 0, _NO_COOKIE)
    return _HEADER.pack(_HEADER.size + len(which), _DESTROY, _REQUEST, 0, 0) + which


def _address(text: bytes) -> bytes:
    words = [int(text[at : at + 8], 16) for at in range(0, len(text), 8)]
    return struct.pack(f"={len(words)}I", *words)


def _port(text: bytes) -> bytes:
    return bytes.fromhex(text.decode())


def _content(table: int) -> bytes:
    """One read gives a page at most."""
    os.lseek(table, 0, os.SEEK_SET)
    read = b""
    while more := os.read(table, 65536):
        read += more
    return read
