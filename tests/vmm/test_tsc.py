"""The rate of the time stamp counter: measured, and compared."""

from __future__ import annotations

import pytest

from ratoon.machine.vmm.tsc import TOLERANCE, host_tsc_khz, same_rate


def test_it_is_measured_the_same_twice() -> None:
    host_tsc_khz.cache_clear()
    first = host_tsc_khz()
    host_tsc_khz.cache_clear()
    second = host_tsc_khz()
    assert 500_000 < first < 10_000_000
    assert same_rate(first, second)


def test_it_is_measured_once_a_process() -> None:
    assert host_tsc_khz() == host_tsc_khz()
    assert host_tsc_khz.cache_info().hits


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (2_100_000, 2_100_000, True),
        (2_100_000, 2_100_000 + int(2_100_000 * TOLERANCE), True),
        (2_100_000, 2_100_000 - int(2_100_000 * TOLERANCE), True),
        (2_100_000, 2_105_000, False),
        (2_100_000, 2_095_000, False),
        (2_100_000, 0, False),
        (0, 2_100_000, False),
    ],
)
def test_same_rate(one: int, other: int, same: bool) -> None:
    assert same_rate(one, other) is same
