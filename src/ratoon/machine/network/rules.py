"""The firewall around a namespace, as text for `nft -f` (nft(8)).

One half is in the namespace, the other on the host's side of its uplink, where the policy is: even
who took a QEMU over cannot get there. Both are pure functions of what they are about.
"""

from __future__ import annotations

from ipaddress import IPv4Address

from ratoon.machine.network.blocks import NEVER
from ratoon.machine.network.policy import OUTBOUND, NetworkPolicy, Rule

#: What every uplink's name on the host begins with, whoever made it.
PREFIX = "rtn"
#: The uplink's name within its namespace.
INSIDE = "up0"
#: The way out may have a smaller MTU than the uplink, and routers that do not say so.
_CLAMP = "tcp flags syn tcp option maxseg size set rt mtu"


def inside() -> str:
    """For the namespace: nobody is heard but whom somebody in it has spoken to, by the uplink.

    Many sandboxes share it. What they send to its own addresses comes in by its loopback.
    """
    return f"""
table inet ratoon
delete table inet ratoon
table inet ratoon {{
    chain input {{
        type filter hook input priority filter; policy drop;
        iifname "{INSIDE}" ct state {{ established, related }} accept
    }}
}}
"""


def outside(name: str, address: IPv4Address, policy: NetworkPolicy) -> str:
    """For the host: the uplink `name` carries what `address` may say under `policy`, and replies.

    The table is called like the uplink, and replaces any that was.
    """
    never = ", ".join(str(network) for network in NEVER)
    last = "accept" if policy == OUTBOUND else "goto refuse"
    allowed = "\n        ".join([*map(_allowed, policy.rules), last])
    # The destination is judged before anybody's DNAT (priority -100) can make another one of it:
    # a port of the host that leads to a container is the host's too. What is refused is told so,
    # TCP by a reset, because the kernel limits how much ICMP it sends.
    return f"""
table inet {name}
delete table inet {name}
table inet {name} {{
    chain prerouting {{
        type filter hook prerouting priority mangle;
        iifname "{name}" jump leaving
    }}
    chain leaving {{
        meta nfproto != ipv4 drop
        ip saddr != {address} drop
        ip daddr {{ {never} }} goto refuse
        fib daddr type != unicast goto refuse
        {allowed}
    }}
    chain refuse {{
        meta l4proto tcp reject with tcp reset
        reject with icmpx admin-prohibited
    }}
    chain input {{
        type filter hook input priority filter;
        iifname "{name}" drop
    }}
    chain forward {{
        type filter hook forward priority filter;
        oifname "{name}" ct state != {{ established, related }} drop
        iifname "{name}" {_CLAMP}
        oifname "{name}" {_CLAMP}
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat;
        ip saddr {address} masquerade
    }}
}}
"""


def _allowed(rule: Rule) -> str:
    port = "" if rule.port is None else f" th dport {rule.port}"
    return f"ip daddr {rule.network} meta l4proto {{ tcp, udp }}{port} accept"
