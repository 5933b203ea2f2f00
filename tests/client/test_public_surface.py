"""What `ratoon` offers, and what it costs to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ratoon


def test_all_names_are_there_in_order() -> None:
    assert ratoon.__all__ == sorted(ratoon.__all__, key=str)
    for name in ratoon.__all__:
        assert getattr(ratoon, name) is not None
        assert name in dir(ratoon)


def test_there_are_no_others() -> None:
    with pytest.raises(AttributeError, match="Engine"):
        _ = ratoon.Engine


def test_the_two_libraries_have_the_same_calls() -> None:
    for name in ("Client", "Command", "Sandbox"):
        sync = {each for each in dir(getattr(ratoon, name)) if not each.startswith("_")}
        both = {each for each in dir(getattr(ratoon, f"Async{name}")) if not each.startswith("_")}
        assert sync == both


def test_importing_it_loads_nothing_that_is_heavy() -> None:
    script = (
        "import sys, ratoon; "
        "print({'httpx2', 'numpy', 'pydantic', 'asyncio', 'fastapi', 'typer'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
