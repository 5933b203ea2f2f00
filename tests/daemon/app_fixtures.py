"""The daemon's application in this process, over a store of small snapshots. No machine runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest
from app_client import application

from ratoon.daemon.settings import Settings
from ratoon.engine.sandbox.engine import Engine
from ratoon.store.snapshot.store import Store
from small_snapshots import publish


@asynccontextmanager
async def bare(home: Path) -> AsyncIterator[Engine]:
    """An engine whose store has base, L1 on it, and L2 on that."""
    store = Store.open(home)
    publish(store, "L2", parent=publish(store, "L1", parent=publish(store, "base")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATOON_RUNTIME", str(home.with_name("run")))
        async with Engine.open(home) as engine:
            yield engine


@pytest.fixture(scope="module")
async def bare_engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """One for the tests of a module, which leave its store as it is."""
    async with bare(tmp_path_factory.mktemp("shared") / "home") as engine:
        yield engine


@pytest.fixture(scope="module")
async def api(bare_engine: Engine) -> AsyncIterator[httpx2.AsyncClient]:
    """Its application, without a token."""
    async with application(bare_engine, Settings()) as client:
        yield client


@pytest.fixture
async def own_engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """One for a test that changes the store."""
    async with bare(tmp_path / "home") as engine:
        yield engine


@pytest.fixture
async def own_api(own_engine: Engine) -> AsyncIterator[httpx2.AsyncClient]:
    """Its application, without a token."""
    async with application(own_engine, Settings()) as client:
        yield client
