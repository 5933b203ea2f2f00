"""The daemon over the engine of the tests, and places for others, for who asks for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from served_daemon import Served, serving
from vm_helpers import processes_of

from ratoon import paths
from ratoon.daemon.settings import Settings
from ratoon.engine.sandbox.engine import Engine
from ratoon.store.snapshot.snapshot import link_snapshot
from ratoon.store.snapshot.store import Store


@pytest.fixture(scope="module")
async def served(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One daemon for the tests of a module."""
    async with serving(engine, tmp_path_factory.mktemp("run"), Settings()) as served:
        yield served


@pytest.fixture
async def forked(served: Served) -> AsyncIterator[Served]:
    """The same; the sandboxes that a test makes go with it."""
    before = set(served.engine.sandboxes)
    yield served
    for sandbox in set(served.engine.sandboxes) - before:
        await sandbox.kill()


@pytest.fixture(scope="module")
async def shared_sandbox(served: Served) -> AsyncIterator[str]:
    """The id of a fork of `base` that the tests of one module share."""
    (sandbox,) = await served.fork()
    yield sandbox
    await served.engine.get(sandbox).kill()


@pytest.fixture
def place(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Path, Path]]:
    """A store of its own with the same `base`, and a directory for its sockets."""
    store = Store.open(tmp_path / "home")
    link_snapshot(engine.store.get("base"), store.snapshots / "base")
    monkeypatch.delenv("RATOON_RUNTIME", raising=False)
    runtime = paths.runtime(store.home)
    yield store.home, runtime
    assert processes_of(store.home, runtime) == []
    assert [*store.sandboxes.iterdir(), *store.staging.iterdir()] == []
    assert not [*runtime.rglob("*")]
