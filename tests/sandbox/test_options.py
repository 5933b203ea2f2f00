"""What a sandbox may be started with: signals by their names."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from ratoon.engine.sandbox.options import SandboxOptions, signal_number


@pytest.mark.parametrize(
    ("name", "number"),
    [("SIGTERM", 15), ("int", 2), ("9", 9), ("SIGRTMIN+3", 37), ("rtmin", 34), ("RTMAX", 64)],
)
def test_signals_by_name_and_number(name: str, number: int) -> None:
    assert signal_number(name) == number
    assert SandboxOptions(stop_signal=name).stop_signal == name


@pytest.mark.parametrize(
    "name", ["", "SIG", "0", "65", "-1", "SIGFOO", "TERM+1", "RTMIN+31", "RTMIN+x", "RTMIN+", "²"]
)
def test_what_is_no_signal(name: str) -> None:
    with pytest.raises(ValidationError, match="there is no signal"):
        SandboxOptions(stop_signal=name)
