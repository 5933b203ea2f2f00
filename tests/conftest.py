"""Options that all tests share."""

from __future__ import annotations

import gc
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("slice", deadline=None)
settings.register_profile("soak", deadline=None, max_examples=2000)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the long runs, not a slice of them")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts what it puts in the background with SIGINT ignored, and so would be the
    # programs that the tests start, and interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.load_profile("soak" if config.getoption("--soak") else "slice")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        long = [item for item in items if item.get_closest_marker("soak")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """As pytest's own, but short, for there are sockets in it; and gone after the test."""
    with tempfile.TemporaryDirectory(prefix="rt-") as name:
        yield Path(name).resolve()


@pytest.fixture(scope="module")
def swept() -> Iterator[None]:
    """For tests that look for garbage: not among all that other tests have left, each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether to try everything, for as long as that takes."""
    return bool(request.config.getoption("--soak"))
