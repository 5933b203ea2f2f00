"""The daemon as a process: its lock, its servers, its signals, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from ratoon import files, paths
from ratoon.daemon.app import create_app
from ratoon.daemon.settings import Settings
from ratoon.daemon.sockets import tcp_socket, unix_socket
from ratoon.errors import Conflict
from ratoon.sandbox.engine import Engine
from ratoon.snapshot.store import Store

#: Held by the daemon of a store, with its process's number in it.
LOCK = "daemon.lock"
#: Seconds for requests that are under way when the daemon is to end.
GRACE = 30
#: Bytes of one message on a WebSocket.
MAX_MESSAGE = 4 * 1024 * 1024
#: Seconds that a connection may wait for its next request.
KEEP_ALIVE = 60


@dataclass(frozen=True)
class Tls:
    """PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Serving:
    """`bind`: HOST:PORT to listen on besides the unix socket, with `tls` if that is given."""

    bind: str | None = None
    tls: Tls | None = None
    settings: Settings = field(default_factory=Settings)
    #: Whether sandboxes end with the daemon.
    stop_sandboxes: bool = False


class Server(uvicorn.Server):
    """One that leaves signals to whoever runs it, and says when it listens."""

    def __init__(self, app: FastAPI, listener: socket.socket, tls: Tls | None) -> None:
        files_of_tls: dict[str, Any] = {}
        if tls:
            files_of_tls = {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",  # it bounds what a client may send before the body
                ws="websockets-sansio",
                ws_max_size=MAX_MESSAGE,
                ws_per_message_deflate=False,
                ws_ping_interval=None,  # who waits for a guest to take its input answers no ping
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=GRACE,
                **files_of_tls,
            )
        )
        self.listens = asyncio.Event()
        self._listener = listener

    async def run_to_the_end(self) -> None:
        await self.serve([self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self) -> None:
        """End once the requests under way have, or at once if asked again."""
        self.force_exit = self.should_exit
        self.should_exit = True


async def serve(serving: Serving, on_start: Callable[[Sequence[str]], None]) -> None:
    """Serve the store of the environment until SIGTERM or SIGINT; `on_start` is told the URLs.

    Conflict: it has a daemon already. InvalidInput, HostError: it cannot listen there.
    """
    store = Store.open(paths.home())
    with ExitStack() as held:
        held.enter_context(_only_daemon(store))
        path = paths.daemon_socket(store.home)
        listeners: list[tuple[str, socket.socket, Tls | None]] = [
            (f"unix://{path}", held.enter_context(unix_socket(path)), None)
        ]
        if serving.bind:
            has_token = serving.settings.token is not None
            tcp = held.enter_context(tcp_socket(serving.bind, has_token=has_token))
            listeners.append((_url(tcp, serving.tls), tcp, serving.tls))
        async with Engine.open(store.home, keep=not serving.stop_sandboxes) as engine:
            app = create_app(engine, serving.settings)
            servers = [Server(app, listener, tls) for _, listener, tls in listeners]
            with _stopping(servers, engine):
                async with asyncio.TaskGroup() as group:
                    for server in servers:
                        group.create_task(server.run_to_the_end())
                    for server in servers:
                        await server.listens.wait()
                    on_start([url for url, _, _ in listeners])


@contextmanager
def _stopping(servers: Sequence[Server], engine: Engine) -> Iterator[None]:
    """Have SIGTERM and SIGINT stop the servers."""

    def stop() -> None:
        engine.events.end()
        for server in servers:
            server.stop()

    loop = asyncio.get_running_loop()
    signals = signal.SIGTERM, signal.SIGINT
    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@contextmanager
def _only_daemon(store: Store) -> Iterator[None]:
    path = store.home / LOCK
    lock = files.try_lock(path)
    if lock is None:
        raise Conflict(
            f"the store {store.home} has a daemon already: process {path.read_text().strip()}"
        )
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def _url(listener: socket.socket, tls: Tls | None) -> str:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{port}"
