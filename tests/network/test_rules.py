"""The firewall's text, as far as a kernel is not needed to judge it; see test_enforcement."""

from __future__ import annotations

from ipaddress import IPv4Address

from ratoon.machine.network import rules
from ratoon.machine.network.blocks import NEVER
from ratoon.machine.network.policy import NONE, OUTBOUND, NetworkPolicy

ADDRESS = IPv4Address("10.213.0.6")


def judgement(policy: NetworkPolicy) -> list[str]:
    """The rules about what leaves a namespace, in their order."""
    text = rules.outside("rtn1", ADDRESS, policy)
    chain = text.partition("chain leaving {")[2].partition("}\n    chain")[0]
    return [line.strip() for line in chain.strip().splitlines()]


def test_what_is_never_reached_is_refused_before_anything_is_allowed() -> None:
    for policy in (OUTBOUND, NetworkPolicy.parse("allow:0.0.0.0/0:*")):
        *_, never, host, allowed = judgement(policy)[:5]
        assert never.endswith("goto refuse")
        assert all(str(block) in never for block in NEVER)
        assert host == "fib daddr type != unicast goto refuse"
        assert allowed.endswith("accept")


def test_a_list_is_closed_by_a_refusal() -> None:
    *_, one, two, last = judgement(NetworkPolicy.parse("allow:203.0.113.0/24:*,198.51.100.7:443"))
    assert one == "ip daddr 198.51.100.7/32 meta l4proto { tcp, udp } th dport 443 accept"
    assert two == "ip daddr 203.0.113.0/24 meta l4proto { tcp, udp } accept"
    assert last == "goto refuse"


def test_a_table_replaces_what_a_dead_engine_left_under_its_name() -> None:
    words = rules.outside("rtn1", ADDRESS, OUTBOUND).split("\n")
    assert words[1:4] == ["table inet rtn1", "delete table inet rtn1", "table inet rtn1 {"]


def test_each_rule_is_about_its_own_uplink_alone() -> None:
    """The table sees all packets of the host."""
    text = rules.outside("rtn1", ADDRESS, OUTBOUND)
    chains = text.partition("chain refuse")[2].split("chain ")[1:]
    for line in (line.strip() for chain in chains for line in chain.splitlines()[2:]):
        if line.strip("} "):
            assert line.startswith(('iifname "rtn1"', 'oifname "rtn1"', f"ip saddr {ADDRESS}"))
    (hook,) = text.partition("chain prerouting {")[2].partition("}")[0].strip().splitlines()[1:]
    assert hook.strip() == 'iifname "rtn1" jump leaving'


def test_an_empty_policy_allows_nothing_out() -> None:
    """It gets no uplink; if it did, it would have to be closed."""
    assert judgement(NONE)[-2:] == ["fib daddr type != unicast goto refuse", "goto refuse"]
