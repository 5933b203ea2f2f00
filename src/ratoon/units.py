"""Sizes and times as people write them and read them. A kilobyte has 1024 bytes."""

from __future__ import annotations

import os
import re

from ratoon.errors import InvalidInput

MIB = 1024 * 1024
GIB = 1024 * MIB

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(?:i?b)?|(b))?", re.IGNORECASE)
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_TIME = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)", re.IGNORECASE)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_size(text: str, *, unit: int = 1) -> int:
    """Bytes from `1048576`, `64k`, `1.5g`, `1MiB`; a number alone counts `unit`s. InvalidInput."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        what = "bytes" if unit == 1 else "MiB"
        raise InvalidInput(f"{text!r} is not a size; write {what}, or a number with K, M, G or T")
    number, prefix, bytes_alone = match.groups()
    each = 1024 ** _POWERS[prefix.lower()] if prefix else 1 if bytes_alone else unit
    return round(float(number) * each) if "." in number else int(number) * each


def size_from_env(variable: str) -> int | None:
    """Bytes that the environment says; None: nothing. InvalidInput, naming the variable."""
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        return parse_size(text)
    except InvalidInput as error:
        raise InvalidInput(f"{variable}: {error}") from None


def parse_duration(text: str) -> float:
    """Seconds from `90`, `90s`, `1.5m`, `2h` or `1d`. InvalidInput."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise InvalidInput(f"{text!r} is not a time; write seconds, or 90s, 15m, 2h, 1d")
    return float(match[1]) * _SECONDS[match[2].lower()]


def format_size(size: int) -> str:
    """Bytes for people, as `1.2 GiB` or `300 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def format_mib(size: float) -> str:
    """Bytes in one unit, as `1228.8 MiB`: for those that stand beside others."""
    return f"{size / MIB:.1f} MiB"
