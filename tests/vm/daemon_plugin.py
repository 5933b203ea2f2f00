"""The daemon over the engine of the tests, for those modules that ask for it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from served_daemon import Served, serving

from ratoon.daemon.settings import Settings
from ratoon.sandbox.engine import Engine


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
