"""Files of one guest as users of the library see them: the client, and the daemon's routes."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from ratoon.client.address import Known, local
from ratoon.client.aio.connection import AsyncConnection
from ratoon.client.aio.files import AsyncFiles
from ratoon.daemon import files as routes
from ratoon.daemon import problems
from ratoon.daemon.serve import Server
from ratoon.daemon.sockets import unix_socket
from ratoon.machine.guest.channel import Channel
from ratoon.machine.guest.files import GuestFiles


@asynccontextmanager
async def served(channel: Channel) -> AsyncIterator[AsyncFiles]:
    """The files of the guest behind `channel`, over HTTP. No sandbox and no engine is needed."""
    app = FastAPI()
    problems.install(app)
    app.include_router(routes.router)
    app.dependency_overrides[routes._files] = lambda: GuestFiles(channel)
    with tempfile.TemporaryDirectory(prefix="ratoon-") as directory:
        path = Path(directory, "daemon.sock")
        with unix_socket(path) as listener:
            server = Server(app, listener, None)
            async with asyncio.TaskGroup() as group:
                group.create_task(server.run_to_the_end())
                await server.listens.wait()
                connection = AsyncConnection(Known(local(str(path), None)))
                try:
                    yield AsyncFiles(connection, "/v1/sandboxes/sb-test")
                finally:
                    await connection.close()
                    server.stop()
