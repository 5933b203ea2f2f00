"""The daemon in this process: an engine in a thread of its own, reached as any other daemon is."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from pathlib import Path

from ratoon import paths
from ratoon.client import address
from ratoon.client.address import Address
from ratoon.client.local import listens

_numbers = count()


class Embedded:
    """An engine on the store in `home` (default: of the environment). Its sandboxes end with it."""

    def __init__(self, home: Path | str | None) -> None:
        self._home = Path(home) if home else None
        self._lock = threading.Lock()
        self._running: tuple[threading.Thread, Address] | None = None
        self._stop: Callable[[], object]

    def find(self) -> Address:
        """Where it listens; it is started if it is not running yet."""
        with self._lock:
            if self._running is None:
                started: Future[Address] = Future()
                # Machines die with the thread that started them, so it is one that stays; and who
                # forgets to close this may end all the same: the next engine cleans up.
                thread = threading.Thread(
                    target=self._run, args=[started], name="ratoon-engine", daemon=True
                )
                thread.start()
                self._running = thread, started.result()
            return self._running[1]

    def close(self) -> None:
        """End the engine, and its sandboxes."""
        with self._lock:
            if self._running:
                self._stop()
                self._running[0].join()
                self._running = None

    def _run(self, started: Future[Address]) -> None:
        try:
            asyncio.run(self._serve(started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _serve(self, started: Future[Address]) -> None:
        # Here, because it is much, and who has a daemon needs none of it.
        from ratoon.daemon.app import create_app
        from ratoon.daemon.serve import Server
        from ratoon.daemon.sockets import unix_socket
        from ratoon.engine.sandbox.engine import Engine

        async with Engine.open(self._home) as engine:
            runtime = paths.runtime(engine.store.home)
            for left in runtime.glob("embedded-*.sock"):
                if not listens(left):
                    left.unlink(missing_ok=True)
            path = runtime / f"embedded-{os.getpid()}-{next(_numbers)}.sock"
            with unix_socket(path) as listener:
                server = Server(create_app(engine), listener, None)
                stopping = asyncio.Event()
                loop = asyncio.get_running_loop()
                self._stop = lambda: loop.call_soon_threadsafe(stopping.set)
                async with asyncio.TaskGroup() as group:
                    group.create_task(server.run_to_the_end())
                    await server.listens.wait()
                    started.set_result(address.local(str(path), None))
                    await stopping.wait()
                    server.stop()
