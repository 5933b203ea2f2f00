"""Who is let in: decided from figures, before anything is started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.errors import InvalidInput, Overloaded
from ratoon.machine.host.admission import Admission, Cost, Reserve, shortage
from ratoon.machine.host.figures import Figures
from ratoon.units import GIB, MIB

COST = Cost(memory_bytes=32 * MIB, disk_bytes=MIB, files=5, threads=8)
PLENTY = Figures(
    memory_bytes=64 * GIB,
    memory_total=128 * GIB,
    memory_owner="the host",
    disk_bytes=500 * GIB,
    disk_total=1000 * GIB,
    files=10_000,
    threads=30_000,
)
RESERVE = Reserve(memory_bytes=GIB // 2, disk_bytes=GIB)


def test_there_is_room() -> None:
    assert shortage(100, 0, COST, PLENTY, RESERVE) is None


@pytest.mark.parametrize(
    ("figures", "n", "under_way", "said"),
    [
        (
            {"memory_bytes": GIB + GIB // 5},
            100,
            0,
            "100 forks need about 3.1 GiB of memory; the host has 1.2 GiB free, of which 512 MiB "
            "are kept in reserve",
        ),
        (
            {"memory_bytes": 600 * MIB},
            1,
            2,
            "1 fork and the 2 being started need about 96 MiB of memory; the host has 600 MiB "
            "free, of which 512 MiB are kept in reserve",
        ),
        (
            {"memory_bytes": 100 * MIB, "memory_owner": "the control group /x"},
            1,
            0,
            "1 fork needs about 32 MiB of memory; the control group /x has 100 MiB free, of which "
            "100 MiB are kept in reserve",
        ),
        (
            {"disk_bytes": GIB + 10 * MIB},
            11,
            0,
            "11 forks need about 11 MiB of disk; the file system has 1.0 GiB free, of which "
            "1.0 GiB are kept in reserve",
        ),
        ({"files": 9}, 2, 0, "2 forks need 10 open files; 9 are left: raise `ulimit -n`"),
        (
            {"threads": -3},
            1,
            0,
            "1 fork needs 8 threads; 0 are left: raise kernel.pid_max or pids.max",
        ),
    ],
)
def test_what_there_is_too_little_of_is_said(
    figures: dict[str, Any], n: int, under_way: int, said: str
) -> None:
    assert shortage(n, under_way, COST, replace(PLENTY, **figures), RESERVE) == said


@given(
    memory=st.integers(0, 8 * GIB),
    n=st.integers(1, 500),
    under_way=st.integers(0, 100),
)
def test_what_is_let_in_fits_and_leaves_the_reserve(memory: int, n: int, under_way: int) -> None:
    figures = replace(PLENTY, memory_bytes=memory)
    fits = (n + under_way) * COST.memory_bytes + RESERVE.memory_bytes <= memory
    assert (shortage(n, under_way, COST, figures, RESERVE) is None) == fits


def admission_to(forks: int) -> Admission:
    """One for which the host has room for so many forks, and shows none of them."""
    cost, kept = Cost().memory_bytes, Reserve.of(PLENTY).memory_bytes
    return Admission(lambda: replace(PLENTY, memory_bytes=forks * cost + kept))


def test_forks_under_way_count_until_they_have_started() -> None:
    admission = admission_to(10)
    with admission.require_room(6) as ended:
        with (
            pytest.raises(Overloaded, match="5 forks and the 6 being started need about"),
            admission.require_room(5),
        ):
            pass
        ended()
        with admission.require_room(5):
            pass
    with admission.require_room(10):
        pass


def test_a_burst_that_fails_is_counted_no_more() -> None:
    admission = admission_to(10)

    def burst() -> None:
        with admission.require_room(10) as ended:
            ended()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        burst()
    with admission.require_room(10):
        pass


def test_the_refusal_says_what_to_do() -> None:
    with (
        pytest.raises(Overloaded, match=r"; fork fewer at a time, or kill sandboxes first$"),
        admission_to(3).require_room(4),
    ):
        pass


# The environment ------------------------------------------------------------------------------


def test_the_reserve_is_a_part_of_what_there_is() -> None:
    assert Reserve.of(PLENTY) == Reserve(2 * GIB, GIB)
    assert Reserve.of(replace(PLENTY, memory_total=8 * GIB)).memory_bytes == 8 * GIB // 20
    assert Reserve.of(replace(PLENTY, memory_total=GIB)).memory_bytes == 128 * MIB
    assert Reserve.of(replace(PLENTY, disk_total=GIB)).disk_bytes == GIB // 100


def test_the_environment_may_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATOON_MEMORY_RESERVE", "0")
    monkeypatch.setenv("RATOON_DISK_RESERVE", "5G")
    monkeypatch.setenv("RATOON_FORK_MEMORY", "1G")
    assert Reserve.of(PLENTY) == Reserve(0, 5 * GIB)
    assert Cost.from_environment() == replace(Cost(), memory_bytes=GIB)


@pytest.mark.parametrize("variable", ["RATOON_MEMORY_RESERVE", "RATOON_FORK_MEMORY"])
def test_a_variable_that_is_no_size_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "much")
    with (
        pytest.raises(InvalidInput, match=f"{variable}: 'much' is not a size"),
        Admission(lambda: PLENTY).require_room(1),
    ):
        pass
