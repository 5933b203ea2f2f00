"""Making sockets, reaching others by them, and what a network shows."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct

from ratoon.jail.attack.around import interfaces
from ratoon.jail.attack.attempts import (
    Denied,
    attempt,
    error_name,
    past_permission,
    register,
    try_each,
)
from ratoon.jail.attack.calls import address, buffer
from ratoon.jail.attack.targets import MAIN_PARENT, T


def family(
    name: str, number: int, kind: int = socket.SOCK_DGRAM, protocol: int = 0, what: str = ""
) -> None:
    def run() -> str:
        socket.socket(number, kind, protocol).close()
        return what or "the socket was made"

    register("sockets", f"make a socket: {name}", run)


NETLINK = 16
family("raw IPv4 (ICMP)", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
family("raw IPv4 (any protocol)", socket.AF_INET, socket.SOCK_RAW, 255)
family("raw IPv6", socket.AF_INET6, socket.SOCK_RAW, 58)
family("ping", socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
family("packet (raw)", 17, socket.SOCK_RAW, 0x0300)
family("packet (datagram)", 17, socket.SOCK_DGRAM, 0)
family("netlink, kernel events", NETLINK, socket.SOCK_RAW, 15)
family("netlink, audit", NETLINK, socket.SOCK_RAW, 9)
family("netlink, packet filter", NETLINK, socket.SOCK_RAW, 12)
family("netlink, generic", NETLINK, socket.SOCK_RAW, 16)
family("netlink, connector", NETLINK, socket.SOCK_RAW, 11)
family("netlink, xfrm", NETLINK, socket.SOCK_RAW, 6)
family("netlink, crypto", NETLINK, socket.SOCK_RAW, 21)
family("vsock", 40, socket.SOCK_STREAM)
family("kernel crypto (ALG)", 38, socket.SOCK_SEQPACKET)
family("Bluetooth (L2CAP)", 31, socket.SOCK_SEQPACKET, 0)
family("Bluetooth (HCI)", 31, socket.SOCK_RAW, 1)
family("XDP", 44, socket.SOCK_RAW)
family("TIPC", 30, socket.SOCK_SEQPACKET)
family("RDS", 21, socket.SOCK_SEQPACKET)
family("QIPCRTR", 42)
family("CAN", 29, socket.SOCK_RAW, 1)
family("IPsec keys (PF_KEY)", 15, socket.SOCK_RAW, 2)
family("SMC", 43, socket.SOCK_STREAM)
family("KCM", 41, socket.SOCK_SEQPACKET)
family("SCTP", socket.AF_INET, socket.SOCK_STREAM, 132)
family("DCCP", socket.AF_INET, 6, 33)
family("multipath TCP", socket.AF_INET, socket.SOCK_STREAM, 262)
family("L2TP", socket.AF_INET, socket.SOCK_DGRAM, 115)


@attempt("sockets", "make a socket: rare and old families")
def _() -> str:
    numbers = [
        3,
        4,
        5,
        6,
        9,
        11,
        12,
        18,
        19,
        20,
        22,
        23,
        24,
        26,
        27,
        28,
        33,
        34,
        35,
        36,
        37,
        39,
        45,
    ]
    kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)

    def one(number: int) -> None:
        for kind in kinds:
            try:
                socket.socket(number, kind, 0).close()
            except OSError:
                if kind == kinds[-1]:
                    raise
            else:
                return

    return try_each(numbers, one)


@attempt("sockets", "see network interfaces besides loopback")
def _() -> str:
    found = interfaces()
    if not found:
        raise Denied("loopback only, or nothing")
    return ", ".join(found)


def netlink_dump(protocol: int, request: int, body: bytes) -> int:
    """Ask a netlink protocol to list its things, and count them."""
    with socket.socket(NETLINK, socket.SOCK_RAW, protocol) as link:
        link.settimeout(0.5)
        link.send(struct.pack("=IHHII", 16 + len(body), request, 0x301, 1, 0) + body)
        count = 0
        while True:
            data = link.recv(1 << 16)
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                if kind == 3:
                    return count
                if kind == 2:
                    number = -struct.unpack_from("=i", data, 16)[0]
                    raise OSError(number, os.strerror(number))
                count += 1
                data = data[max(16, (length + 3) & ~3) :]


@attempt("sockets", "list links and routes over netlink")
def _() -> str:
    links = netlink_dump(0, 18, struct.pack("=BxHiII", 0, 0, 0, 0, 0))
    if links <= 1:
        raise Denied(f"{links} link (loopback only)")
    return f"{links} links"


@attempt("sockets", "list the sockets of others over netlink (sock_diag)")
def _() -> str:
    def one(number: int) -> str:
        if number == socket.AF_UNIX:
            body = struct.pack("=BBHIIIII", number, 0, 0, 2**32 - 1, 0, 1, 0, 0)
        else:
            body = struct.pack("=BBBBI48x", number, 6, 0, 0, 2**32 - 1)
        count = netlink_dump(4, 20, body)
        if count == 0:
            raise Denied("none to be seen")
        return f"{count} sockets"

    return try_each([socket.AF_INET, socket.AF_INET6, socket.AF_UNIX], one)


STREAMS = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)


def connect_unix(name: str | bytes) -> str:
    last: OSError = OSError(errno.ECONNREFUSED, "")
    for kind in STREAMS:
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.setblocking(False)
            try:
                client.connect(name)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINPROGRESS):
                    return f"its queue was reached ({error_name(error.errno)})"
                last = error
            else:
                return "connected"
    raise last


def abstract_name(name: str) -> bytes:
    return b"\0" + os.fsencode(name.lstrip("\0@"))


@attempt("sockets", "connect to unix sockets of others by path")
def _() -> str:
    return try_each(T.unix_sockets, connect_unix)


@attempt("sockets", "connect to unix sockets of others by climbing paths")
def _() -> str:
    prefixes = ("../" * 20, "/proc/1/root/", "/proc/self/root/", f"/proc/{MAIN_PARENT}/root/")
    paths = [prefix + path.lstrip("/") for prefix in prefixes for path in T.unix_sockets]
    return try_each(paths, connect_unix)


@attempt("sockets", "connect to abstract sockets of others")
def _() -> str:
    return try_each(T.abstract, lambda name: connect_unix(abstract_name(name)))


@attempt("sockets", "send a datagram to unix sockets of others")
def _() -> str:
    def one(name: str | bytes) -> str:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            return f"{sender.sendto(b'x', name)} byte"

    return try_each([*T.unix_sockets, *map(abstract_name, T.abstract)], one)


def squat(name: str) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(abstract_name(name))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "the name is taken, so the name space is shared"
            raise
    raise Denied("bound, in a name space of its own")


@attempt("sockets", "share the abstract name space with others (bind their names)")
def _() -> str:
    return try_each(T.abstract, squat)


@attempt("sockets", "listen on an abstract name where others may connect")
def _() -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"\0standin-%d" % os.getpid())
        listener.listen(1)
        if not T.abstract:
            return "it listens; whether others share the name space cannot be told"
        return f"it listens, and {try_each(T.abstract, squat)}"


def version_of(host: str) -> int:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def connect_tcp(target: tuple[str, int], kind: int = socket.SOCK_STREAM, protocol: int = 0) -> str:
    with socket.socket(version_of(target[0]), kind, protocol) as client:
        client.setblocking(False)
        result = client.connect_ex(target)
        if result == errno.EINPROGRESS:
            if select.select([], [client], [], 0.3)[1]:
                result = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                return "connected" if result == 0 else f"sent, answer {error_name(result)}"
            return "sent (EINPROGRESS)"
        if result:
            raise OSError(result, os.strerror(result))
        return "connected"


@attempt("sockets", "connect to TCP services")
def _() -> str:
    return try_each(T.tcp, connect_tcp)


@attempt("sockets", "connect to TCP services with fast open (sendto without connect)")
def _() -> str:
    def one(target: tuple[str, int]) -> str:
        with socket.socket(version_of(target[0]), socket.SOCK_STREAM) as client:
            client.setblocking(False)
            try:
                return f"{client.sendto(b'x', socket.MSG_FASTOPEN, target)} byte"
            except BlockingIOError:
                return "sent (EINPROGRESS)"

    return try_each(T.tcp, one)


@attempt("sockets", "connect to TCP services over multipath TCP, SMC or SCTP")
def _() -> str:
    def one(pair: tuple[tuple[str, int], int]) -> str:
        return connect_tcp(pair[0], socket.SOCK_STREAM, pair[1])

    return try_each([(target, protocol) for target in T.tcp for protocol in (262, 132)], one)


@attempt("sockets", "connect to TCP services over IPv4 written as IPv6")
def _() -> str:
    targets = [(f"::ffff:{host}", port) for host, port in T.tcp if ":" not in host]
    return try_each(targets, connect_tcp)


@attempt("sockets", "send to UDP services")
def _() -> str:
    def one(target: tuple[str, int]) -> str:
        with socket.socket(version_of(target[0]), socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            return f"{sender.sendto(b'x', target)} byte"

    return try_each(T.udp, one)


@attempt("sockets", "ask a name server, and broadcast")
def _() -> str:
    def one(target: tuple[str, int]) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            return f"{sender.sendto(b'', target)} bytes, sent"

    return try_each(
        [("127.0.0.53", 9), ("255.255.255.255", 9), ("169.254.169.254", 9), ("224.0.0.251", 9)],
        one,
    )


@attempt("sockets", "connect to the host over vsock (CID 0, 1 and 2)")
def _() -> str:
    return try_each(range(3), connect_vsock)


@attempt("sockets", "connect to other guests over vsock")
def _() -> str:
    return try_each(range(3, 12), connect_vsock)


def connect_vsock(cid: int) -> str:
    with socket.socket(40, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect((cid, 1024))
        except BlockingIOError:
            return "sent (EINPROGRESS)"
        except ConnectionResetError:
            return "answered with a reset, so it was reached"
        return "connected"


@attempt("sockets", "listen on a port for all of the network")
def _() -> str:
    def one(host: str) -> str:
        with socket.socket(version_of(host), socket.SOCK_STREAM) as listener:
            listener.bind((host, 0))
            listener.listen(1)
        if not interfaces():
            raise Denied("bound, but in a network with nobody in it")
        return "it listened"

    return try_each(["0.0.0.0", "::"], one)


@attempt("sockets", "listen on a low port")
def _() -> str:
    def one(port: int) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("0.0.0.0", port))
        return "bound"

    return try_each([81, 783, 1023], one)


@attempt("sockets", "bind to addresses of the host")
def _() -> str:
    hosts = sorted({host for host, _ in T.tcp + T.udp if not host.startswith(("127.", "::1"))})

    def one(host: str) -> str:
        with socket.socket(version_of(host), socket.SOCK_DGRAM) as holder:
            holder.bind((host, 0))
        if not interfaces():  # an empty network takes any address
            raise Denied("bound, but in a network with nobody in it")
        return "bound"

    return try_each(hosts, one)


def socket_option(name: str, level: int, option: int, value: int | bytes) -> None:
    def run() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as plain:
            plain.setsockopt(level, option, value)
        return "set"

    register("sockets", f"set a socket option: {name}", run)


socket_option("IP_TRANSPARENT", 0, 19, 1)
socket_option("SO_BINDTODEVICE", socket.SOL_SOCKET, 25, b"lo\0")
socket_option("SO_MARK", socket.SOL_SOCKET, 36, 7)
socket_option("SO_PRIORITY above 6", socket.SOL_SOCKET, 12, 7)
socket_option("SO_RCVBUFFORCE", socket.SOL_SOCKET, 33, 1 << 20)
socket_option("SO_DEBUG", socket.SOL_SOCKET, 1, 1)
socket_option("upper layer TLS (kTLS)", socket.IPPROTO_TCP, 31, b"tls")


@attempt("sockets", "set a packet filter program on a socket (SO_ATTACH_FILTER)")
def _() -> str:
    program = buffer(struct.pack("=HBBI", 6, 0, 0, 2**32 - 1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as plain:
        plain.setsockopt(socket.SOL_SOCKET, 26, struct.pack("=HxxxxxxQ", 1, address(program)))
    return "set"


@attempt("sockets", "change addresses and routes with ioctl")
def _() -> str:
    requests = {"SIOCSIFADDR": 0x8916, "SIOCSIFFLAGS": 0x8914, "SIOCSIFMTU": 0x8922}

    def one(name: str) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            request = struct.pack("16sHH20x", b"standin-none", socket.AF_INET, 0)
            return past_permission(
                lambda: fcntl.ioctl(control, requests[name], request), errno.ENODEV
            )

    return try_each(requests, one)
