"""Which connections of a guest lead out of it, by the kernel's tables of them."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from ratoon.machine.guest.agent import connections as module
from ratoon.machine.guest.agent.connections import Connections

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  inode"
ROW = "%4d: %s %s %s 00000000:00000000 00:00000000 00000000     0        0 12345 1 ffff88 100 0 0"

ESTABLISHED, SYN_SENT, FIN_WAIT1, TIME_WAIT = "01", "02", "04", "06"
CLOSE_WAIT, LISTEN = "08", "0A"
ETH0, WORLD = "10.0.2.15", "198.51.100.7"


def end(address: str, port: int) -> str:
    """As the tables have it; IPv4 in IPv6 where it begins with `::ffff:`."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


def table(*rows: tuple[str, str, str]) -> str:
    return "\n".join([HEAD, *(ROW % (number, *row) for number, row in enumerate(rows)), ""])


FOUR = [
    (end(ETH0, 40001), end(WORLD, 443), ESTABLISHED),
    (end(ETH0, 40002), end(WORLD, 443), SYN_SENT),
    (end(ETH0, 40003), end("10.0.2.2", 80), CLOSE_WAIT),
    (end(ETH0, 40004), end(WORLD, 443), TIME_WAIT),
    (end(ETH0, 40005), end(ETH0, 80), ESTABLISHED),
    (end(ETH0, 80), end("0.0.0.0", 0), LISTEN),
    (end("0.0.0.0", 80), end("0.0.0.0", 0), LISTEN),
    (end("127.0.0.1", 40006), end("127.0.0.1", 80), ESTABLISHED),
    (end("172.17.0.1", 40007), end("172.17.0.2", 80), ESTABLISHED),
]
SIX = [
    (end(f"::ffff:{ETH0}", 40008), end(f"::ffff:{WORLD}", 443), FIN_WAIT1),
    (end("::1", 40009), end("::1", 80), ESTABLISHED),
    (end("::", 80), end("::", 0), LISTEN),
    (end("::ffff:127.0.0.1", 40010), end("::ffff:127.0.0.1", 80), ESTABLISHED),
]


@pytest.fixture
def destroyed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the kernel was asked for in vain, so that it loads its modules."""
    asked: list[bytes] = []
    monkeypatch.setattr(module, "destroy", asked.extend)
    return asked


def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *tables: str) -> list[bytes]:
    paths = [tmp_path / str(number) for number in range(len(tables))]
    for path, text in zip(paths, tables, strict=True):
        path.write_text(text)
    monkeypatch.setattr(module, "TABLES", (*map(str, paths), str(tmp_path / "absent")))
    connections = Connections()
    try:
        return connections.look()
    finally:
        for table in connections._tables:
            os.close(table)


def request(family: int, own: str, own_port: int, other: str, other_port: int) -> bytes:
    """inet_diag_req_v2 in a message, as linux/inet_diag.h and linux/netlink.h have them."""
    ends = (socket.inet_pton(family, each).ljust(16, b"\0") for each in (own, other))
    asked = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
    asked += struct.pack(">HH", own_port, other_port) + b"".join(ends)
    asked += struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)
    return struct.pack("=IHHII", 16 + len(asked), 21, 1, 0, 0) + asked


def test_those_that_lead_out_and_have_somebody_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destroyed: list[bytes]
) -> None:
    assert look(tmp_path, monkeypatch, table(*FOUR), table(*SIX)) == [
        request(socket.AF_INET, ETH0, 40001, WORLD, 443),
        request(socket.AF_INET, ETH0, 40002, WORLD, 443),
        request(socket.AF_INET, ETH0, 40003, "10.0.2.2", 80),
        request(socket.AF_INET6, f"::ffff:{ETH0}", 40008, f"::ffff:{WORLD}", 443),
    ]
    assert destroyed == [request(socket.AF_INET, "0.0.0.0", 0, "0.0.0.0", 0)]


def test_where_there_is_none_the_kernel_is_asked_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destroyed: list[bytes]
) -> None:
    assert look(tmp_path, monkeypatch, table(*FOUR[3:]), table(*SIX[1:])) == []
    assert destroyed == []


def test_a_long_table_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destroyed: list[bytes]
) -> None:
    rows = [(end(ETH0, port), end(WORLD, 443), ESTABLISHED) for port in range(20000, 25000)]
    assert len(look(tmp_path, monkeypatch, table(*rows))) == 5000
