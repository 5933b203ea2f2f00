"""A client of the daemon's application in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2

from ratoon.daemon.app import create_app
from ratoon.daemon.settings import Settings
from ratoon.engine.sandbox.engine import Engine


@asynccontextmanager
async def application(engine: Engine, settings: Settings) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that calls the application of `engine` directly, as if over a unix socket."""
    transport = httpx2.ASGITransport(create_app(engine, settings), raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://ratoon") as client:
        yield client
