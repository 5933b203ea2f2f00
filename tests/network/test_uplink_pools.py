"""Where uplinks get their addresses: from a block that no route of the host needs."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.errors import HostError
from ratoon.machine.network.uplink import POOLS, UPLINKS, choose_pool

BLOCKS = st.one_of(
    st.builds(
        lambda pool, length: pool.supernet(new_prefix=length),
        st.sampled_from(POOLS),
        st.integers(0, 20),
    ),
    st.builds(
        lambda pool, number: IPv4Network((int(pool.network_address) + number, 32)),
        st.sampled_from(POOLS),
        st.integers(0, 4 * UPLINKS - 1),
    ),
)


def test_the_pools_have_four_addresses_for_each_uplink_and_do_not_overlap() -> None:
    for pool in POOLS:
        assert pool.num_addresses == 4 * UPLINKS
        assert sum(pool.overlaps(other) for other in POOLS) == 1


def test_a_host_with_a_simple_network_uses_the_first() -> None:
    assert choose_pool([]) == POOLS[0]
    assert choose_pool([IPv4Network("192.0.2.0/24"), IPv4Network("127.0.0.0/8")]) == POOLS[0]


@given(st.lists(BLOCKS, max_size=5))
def test_no_route_is_in_the_way(routes: list[IPv4Network]) -> None:
    in_the_way = [route for route in routes if route.prefixlen >= 8]
    free = [pool for pool in POOLS if not any(pool.overlaps(route) for route in in_the_way)]
    if free:
        assert choose_pool(routes) == free[0]
    else:
        with pytest.raises(HostError, match=r"routes into each of 10\.213\.0\.0/20, "):
            choose_pool(routes)


def test_the_two_halves_of_a_vpn_are_a_default_route() -> None:
    assert choose_pool([IPv4Network("0.0.0.0/1"), IPv4Network("128.0.0.0/1")]) == POOLS[0]
    assert choose_pool([IPv4Network("10.0.0.0/8")]) == POOLS[1]
