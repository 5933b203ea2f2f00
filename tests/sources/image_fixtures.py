"""A registry, a cache of its own, and a look into disks, for the tests of image sources."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from disk_looks import Look, loop_devices_of, mounted

from ratoon.store.disk.tools import disk_cell
from registry_server import Registry, program, serving


@pytest.fixture(scope="session")
def registry_program() -> Path:
    return program()


@pytest.fixture(scope="module")
def registry(
    registry_program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Registry]:
    with serving(registry_program, tmp_path_factory.mktemp("registry")) as registry:
        yield registry


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; at its end nothing is left in it that was half made."""
    disk_cell()  # one for the process, of the cache that stays
    cache = tmp_path / "cache"
    monkeypatch.setenv("RATOON_CACHE", str(cache))
    return cache


@pytest.fixture
def look(cache: Path, tmp_path: Path) -> Iterator[Look]:
    """Makes the root disk of an image, and mounts it for the test: its root."""
    with ExitStack() as stack:
        yield lambda reference: stack.enter_context(mounted(reference, tmp_path))
    left = [path.name for path in cache.rglob("*.tmp")]
    assert left == []
    # Other namespaces of mounts, such as that of an image that is unpacked, may have had it too.
    deadline = time.monotonic() + 120
    while loop_devices_of(tmp_path):
        assert time.monotonic() < deadline, loop_devices_of(tmp_path)
        time.sleep(0.05)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
