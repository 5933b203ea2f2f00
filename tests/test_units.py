"""Sizes and times as people write them, wherever they do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratoon.errors import InvalidInput
from ratoon.units import (
    GIB,
    MIB,
    format_mib,
    format_size,
    parse_duration,
    parse_size,
    size_from_env,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("10k", 10 << 10),
        ("10 M", 10 << 20),
        ("1.5g", 3 << 29),
        ("2G", 2 << 30),
        ("2gb", 2 << 30),
        (" 2GiB ", 2 << 30),
        ("0.5 MiB", 1 << 19),
        ("1T", 1 << 40),
    ],
)
def test_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "-1", ".5G", "1.G", "G", "10X", "10iB", "1 000", "0x10", "1e9", "nan", "inf"]
)
def test_not_a_size(text: str) -> None:
    with pytest.raises(InvalidInput, match="not a size; write bytes, or"):
        parse_size(text)
    with pytest.raises(InvalidInput, match="not a size; write MiB, or"):
        parse_size(text, unit=MIB)


@given(st.integers(min_value=0))
def test_no_digit_of_a_size_is_lost(size: int) -> None:
    assert parse_size(f"{size}") == parse_size(f"{size}b", unit=MIB) == size
    assert parse_size(f"{size}", unit=MIB) == parse_size(f"{size}M") == size * MIB


def test_a_size_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RATOON_SOMETHING", raising=False)
    assert size_from_env("RATOON_SOMETHING") is None
    monkeypatch.setenv("RATOON_SOMETHING", "")
    assert size_from_env("RATOON_SOMETHING") is None
    monkeypatch.setenv("RATOON_SOMETHING", "1.5g")
    assert size_from_env("RATOON_SOMETHING") == 3 << 29
    monkeypatch.setenv("RATOON_SOMETHING", "much")
    with pytest.raises(InvalidInput, match=r"^RATOON_SOMETHING: 'much' is not a size"):
        size_from_env("RATOON_SOMETHING")


def test_times() -> None:
    for text, time in (("90", 90), ("90s", 90), ("1.5m", 90), ("2H", 7200), (" 1d ", 86400)):
        assert parse_duration(text) == time
    for text in ("", "s", "-1", "1w", "1 2", "0x10", "infinity", "nan", "1e3"):
        with pytest.raises(InvalidInput, match="not a time; write seconds, or 90s, 15m"):
            parse_duration(text)


def test_sizes_for_people() -> None:
    assert [format_size(size) for size in (0, 300 * MIB, GIB, 1288490189)] == [
        "0 MiB",
        "300 MiB",
        "1.0 GiB",
        "1.2 GiB",
    ]
    assert format_mib(1228.8 * MIB) == "1228.8 MiB"
