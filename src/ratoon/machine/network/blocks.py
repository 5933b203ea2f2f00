"""Blocks of addresses that are not for guests."""

from __future__ import annotations

from ipaddress import IPv4Network

#: Not for guests under any policy. On a cloud's machines, link-local is where credentials are.
NEVER = {
    IPv4Network("0.0.0.0/8"): "this network",
    IPv4Network("127.0.0.0/8"): "the host's loopback",
    IPv4Network("169.254.0.0/16"): "link-local",
    IPv4Network("224.0.0.0/4"): "multicast",
    IPv4Network("240.0.0.0/4"): "reserved and broadcast",
}
#: QEMU's user network: a guest's packets for it end in QEMU.
GUESTS_OWN = IPv4Network("10.0.2.0/24")
