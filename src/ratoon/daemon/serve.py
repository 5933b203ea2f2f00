"""The daemon as a process: its lock, its servers, its signals, its end."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from ratoon import files, paths
from ratoon.daemon.app import create_app
from ratoon.daemon.conversation import HUNG_UP
from ratoon.daemon.settings import Settings
from ratoon.daemon.sockets import tcp_socket, unix_socket
from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import Conflict
from ratoon.store.snapshot.store import Store
from ratoon.syscalls import peer_credentials

log = logging.getLogger(__name__)

#: Who asked for what.
AUDIT_LOG = "audit.log"
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


class _Named(asyncio.Protocol):
    """A connection that knows who is at the other end of a unix socket, for the audit log."""

    client: tuple[str, int] | None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer: socket.socket = transport.get_extra_info("socket")
        if peer.family == socket.AF_UNIX:
            pid, uid, _ = peer_credentials(peer)
            self.client = (f"uid={uid},pid", pid)


class _Http(_Named, H11Protocol):  # it bounds what a client may send before the body
    pass


class _WebSocket(_Named, WebSocketsSansIOProtocol):
    """One that can tell that its client has left, while nothing is read from it."""

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if hasattr(self, "scope"):
            extensions: dict[str, Any] = self.scope["extensions"]
            extensions[HUNG_UP] = self._hung_up

    def _hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))


class Server(uvicorn.Server):
    """One that leaves signals to whoever runs it, and says when it listens."""

    def __init__(self, app: FastAPI, listener: socket.socket, tls: Tls | None) -> None:
        files_of_tls: dict[str, Any] = {}
        if tls:
            files_of_tls = {"ssl_certfile": tls.certificate, "ssl_keyfile": tls.key}
        super().__init__(
            uvicorn.Config(
                app,
                http=_Http,
                ws=_WebSocket,
                ws_max_size=MAX_MESSAGE,
                ws_per_message_deflate=False,
                ws_ping_interval=None,  # who waits for a guest to take its input answers no ping
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # or a client could say who it is, in the audit log
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
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # it tells of every connection
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
            settings = replace(serving.settings, audit_log=store.home / AUDIT_LOG)
            app = create_app(engine, settings)
            servers = [Server(app, listener, tls) for _, listener, tls in listeners]
            with _stopping(servers, engine):
                async with asyncio.TaskGroup() as group:
                    for server in servers:
                        group.create_task(server.run_to_the_end())
                    for server in servers:
                        await server.listens.wait()
                    urls = [url for url, _, _ in listeners]
                    log.info("serving %s on %s", store.home, " and ".join(urls))
                    on_start(urls)
        log.info("ended")


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
    path = paths.daemon_lock(store.home)
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
