"""An engine served over HTTP, and a client of it in the same process: what a client sees."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ratoon.bench.samples import milliseconds
from ratoon.client.address import Known, parse
from ratoon.client.aio.connection import AsyncConnection
from ratoon.daemon.app import create_app
from ratoon.daemon.serve import Server
from ratoon.daemon.settings import Settings
from ratoon.daemon.sockets import unix_socket
from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import RatoonError


@dataclass(frozen=True)
class Answered:
    """What a request was answered with, and after how long."""

    body: Any
    ms: float


@dataclass(frozen=True)
class Api:
    """The daemon's HTTP interface, with a clock."""

    connection: AsyncConnection

    async def post(self, path: str, **body: Any) -> Answered:
        """RatoonError: it was refused."""
        began = time.perf_counter()
        answer = await self.connection.ask("POST", path, body=body)
        return Answered(answer, milliseconds(time.perf_counter() - began))

    async def fork(self, tag: str) -> Answered:
        """One sandbox; the body tells of it."""
        answered = await self.post("/v1/sandboxes", snapshot_tag=tag)
        (sandbox,) = answered.body
        return Answered(sandbox, answered.ms)

    async def exec(self, sandbox: str, argv: list[str]) -> Answered:
        """RatoonError: it did not exit with 0."""
        path = f"/v1/sandboxes/{sandbox}/exec"
        answered = await self.post(path, args=argv, timeout_secs=60)
        if answered.body["exit_code"]:
            raise RatoonError(f"{argv[0]} failed in {sandbox}: {answered.body['stderr']}")
        return answered

    async def kill(self, sandbox: str) -> None:
        await self.connection.ask("DELETE", f"/v1/sandboxes/{sandbox}")


@asynccontextmanager
async def served(engine: Engine) -> AsyncIterator[Api]:
    """A client of `engine`, over a unix socket as the command line has it."""
    with tempfile.TemporaryDirectory(prefix="ratoon-") as name:
        room = Path(name)  # below /tmp: the path of a socket is short
        async with _served(engine, room / "audit.log", room / "socket") as connection:
            yield Api(connection)


@asynccontextmanager
async def _served(engine: Engine, audit_log: Path, socket: Path) -> AsyncIterator[AsyncConnection]:
    app = create_app(engine, Settings(audit_log=audit_log))
    with unix_socket(socket) as listener:
        server = Server(app, listener, None)
        serving = asyncio.create_task(server.run_to_the_end())
        connection = AsyncConnection(Known(parse(f"unix://{socket}", token=None)))
        try:
            await server.listens.wait()
            yield connection
        finally:
            await connection.close()
            server.stop()
            await serving
