"""A daemon over an engine of the tests, on real sockets in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from vm_helpers import FOR_EVER

from ratoon.daemon.app import create_app
from ratoon.daemon.context import Daemon
from ratoon.daemon.serve import Server
from ratoon.daemon.settings import Settings
from ratoon.daemon.sockets import tcp_socket, unix_socket
from ratoon.engine.sandbox.engine import Engine


@dataclass(frozen=True)
class Served:
    """A daemon: where it listens, a client of its unix socket, and what is behind it."""

    url: str
    socket: Path
    api: httpx2.AsyncClient
    engine: Engine
    daemon: Daemon

    async def fork(self, n: int = 1, **options: object) -> list[str]:
        """The ids of new sandboxes."""
        body = {"snapshot_tag": "base", "n": n, **options}
        answer = await self.api.post("/v1/sandboxes", json=body)
        assert answer.status_code == 201, answer.text
        return [each["id"] for each in answer.json()]


@asynccontextmanager
async def serving(engine: Engine, place: Path, settings: Settings) -> AsyncIterator[Served]:
    """Serve `engine` on a unix socket below `place`, and on TCP."""
    app = create_app(engine, settings)
    path = place / "daemon.sock"
    with unix_socket(path) as on_unix, tcp_socket("127.0.0.1:0", has_token=False) as on_tcp:
        servers = [Server(app, listener, None) for listener in (on_unix, on_tcp)]
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(server.run_to_the_end())
            for server in servers:
                await server.listens.wait()
            transport = httpx2.AsyncHTTPTransport(
                uds=str(path), limits=httpx2.Limits(max_connections=None)
            )
            async with httpx2.AsyncClient(
                transport=transport, base_url="http://ratoon", timeout=FOR_EVER
            ) as api:
                url = f"http://127.0.0.1:{on_tcp.getsockname()[1]}"
                yield Served(url, path, api, engine, app.state.daemon)
            for server in servers:
                server.stop()
