"""Limits that cannot be meant are refused, with what could be."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ratoon.machine.host.limits import Limits
from ratoon.units import MIB


def test_none_is_the_default() -> None:
    assert Limits() == Limits(memory_bytes=None, cpus=None, pids=None, disk_bytes=None)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"memory_bytes": 64 * MIB}, "64 MiB are too few; use 128 MiB or more"),
        ({"memory_bytes": -1}, "too few"),
        ({"disk_bytes": 16 * MIB - 1}, "16777215 bytes are too few; use 16 MiB or more"),
        ({"cpus": 0.01}, r"0\.01 CPUs: use 0\.05 or more"),
        ({"cpus": float("nan")}, r"nan CPUs: use 0\.05 or more"),
        ({"cpus": float("inf")}, "inf CPUs"),
        ({"pids": 8}, "8 threads: use 160 or more"),
        ({"memory": 1}, "memory"),
        ({"output_bytes": 1}, "output_bytes"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        Limits(**values)


def test_the_least_of_each_is_taken() -> None:
    Limits(memory_bytes=128 * MIB, cpus=0.05, pids=160, disk_bytes=16 * MIB)


def test_a_limit_that_there_was_once_is_read_over() -> None:
    """Records of kept sandboxes have it, and it was None in every one."""
    written = '{"pids": 200, "output_bytes": null}'
    assert Limits.model_validate_json(written) == Limits(pids=200)
