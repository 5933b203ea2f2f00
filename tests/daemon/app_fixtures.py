"""The daemon's application in this process, over a store of small snapshots. No machine runs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from app_client import application

from fake_snapshots import publish
from ratoon.daemon.settings import Settings
from ratoon.sandbox.engine import Engine
from ratoon.snapshot.store import Store


@pytest.fixture
async def bare_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Engine]:
    """An engine whose store has base, L1 on it, and L2 on that."""
    home = tmp_path / "home"
    monkeypatch.setenv("RATOON_RUNTIME", str(tmp_path / "run"))
    store = Store.open(home)
    publish(store, "L2", publish(store, "L1", publish(store, "base")))
    async with Engine.open(home) as engine:
        yield engine


@pytest.fixture
async def api(bare_engine: Engine) -> AsyncIterator[httpx2.AsyncClient]:
    """The application without a token."""
    async with application(bare_engine, Settings()) as client:
        yield client
