"""Network policies: what they say, and that nothing else is taken for one."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from ratoon.errors import InvalidInput
from ratoon.machine.network.blocks import GUESTS_OWN, NEVER
from ratoon.machine.network.policy import NONE, OUTBOUND, NetworkPolicy, Rule

PLACES = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0, 2**32 - 1).map(IPv4Address),
    st.integers(0, 32),
).filter(lambda place: not any(place.subnet_of(block) for block in (*NEVER, GUESTS_OWN)))
RULES = st.builds(Rule, network=PLACES, port=st.none() | st.integers(1, 65535))


class Holder(BaseModel):
    network: NetworkPolicy


def test_the_simple_ones() -> None:
    assert NetworkPolicy.parse("none") == NONE
    assert NetworkPolicy.parse("outbound") == OUTBOUND
    assert (str(NONE), str(OUTBOUND)) == ("none", "outbound")


def test_a_list() -> None:
    policy = NetworkPolicy.parse("allow:198.51.100.7:443, 203.0.113.0/24:*")
    assert policy.rules == (
        Rule(network=IPv4Network("198.51.100.7/32"), port=443),
        Rule(network=IPv4Network("203.0.113.0/24"), port=None),
    )
    assert str(policy) == "allow:198.51.100.7:443,203.0.113.0/24:*"


@given(st.lists(RULES, min_size=1, max_size=8))
def test_what_is_printed_is_parsed_again(rules: list[Rule]) -> None:
    policy = NetworkPolicy.parse("allow:" + ",".join(map(str, rules)))
    assert set(policy.rules) == set(rules)
    assert NetworkPolicy.parse(str(policy)) == policy


@given(st.lists(RULES, min_size=1, max_size=8), st.randoms())
def test_those_that_mean_the_same_are_equal(rules: list[Rule], random: object) -> None:
    one = NetworkPolicy.parse("allow:" + ",".join(map(str, rules)))
    other = NetworkPolicy.parse("allow:" + ",".join(map(str, [*reversed(rules), rules[0]])))
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == str(other)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "use none, outbound, or allow:"),
        ("None", "use none, outbound, or allow:"),
        ("outbound,allow:1.2.3.4:5", "use none, outbound, or allow:"),
        ("allow:", "rule '' has no port"),
        ("allow:198.51.100.7", "rule '198.51.100.7' has no port; write 198.51.100.7:443"),
        ("allow:1.2.3.4:80,", "rule '' has no port"),
        ("allow:1.2.3.4:80,5.6.7.8:0", "rule '5.6.7.8:0': '0' is not a port"),
        ("allow:1.2.3.4:65536", "'65536' is not a port"),
        ("allow:1.2.3.4:-1", "'-1' is not a port"),
        ("allow:1.2.3.4:\u00b2", "is not a port"),
        ("allow:1.2.3.4:" + "9" * 5000, "is not a port"),
        ("allow:1.2.3.4:http", "'http' is not a port"),
        ("allow:example.org:443", "'example.org' is neither an IPv4 address nor a CIDR block"),
        ("allow:1.2.3:80", "'1.2.3' is neither"),
        ("allow:1.2.3.4/33:80", "'1.2.3.4/33' is neither"),
        ("allow:10.0.0.1/8:443", "10.0.0.1/8 is an address within a block; write 10.0.0.0/8"),
        ("allow:2001:db8::1:443", "guests have no IPv6"),
        ("allow:[2001:db8::1]:443", "guests have no IPv6"),
        ("allow:127.0.0.1:80", "127.0.0.0/8 (the host's loopback) is not reached under any"),
        ("allow:169.254.169.254:80", "169.254.0.0/16 (link-local) is not reached under any"),
        ("allow:224.0.0.251:5353", "224.0.0.0/4 (multicast) is not reached under any"),
        ("allow:255.255.255.255:*", "240.0.0.0/4 (reserved and broadcast) is not reached"),
        ("allow:10.0.2.2:80", "10.0.2.0/24 (the guest's own network) is not reached under any"),
    ],
)
def test_what_is_wrong_is_named(text: str, complaint: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        NetworkPolicy.parse(text)
    assert complaint in str(refusal.value)


@given(st.text())
def test_any_other_text_is_refused(text: str) -> None:
    assume(text not in ("none", "outbound"))
    with pytest.raises(InvalidInput):
        NetworkPolicy.parse(text)
    with pytest.raises(InvalidInput):
        NetworkPolicy.parse("allow:" + text)


def test_it_is_written_into_records_as_its_text() -> None:
    holder = Holder.model_validate({"network": "allow:203.0.113.0/24:*,198.51.100.7:443"})
    text = '{"network":"allow:198.51.100.7:443,203.0.113.0/24:*"}'
    assert holder.model_dump_json() == text
    assert Holder.model_validate_json(text) == holder
    assert Holder(network=NONE).model_dump_json() == '{"network":"none"}'


@pytest.mark.parametrize("data", ["some", "allow:", {"kind": "allow"}, {"kind": "some"}, 7])
def test_a_record_that_says_anything_else_is_refused(data: object) -> None:
    with pytest.raises(ValidationError):
        Holder.model_validate({"network": data})


def test_a_simple_one_has_no_rules() -> None:
    rule = Rule(network=IPv4Network("198.51.100.7/32"), port=443)
    with pytest.raises(ValidationError):
        NetworkPolicy(kind="outbound", rules=(rule,))
