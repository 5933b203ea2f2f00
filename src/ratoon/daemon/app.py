"""The application: all routes over one engine.

`serve` offers it on sockets; a program that has it embedded needs none.
"""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware import Middleware

from ratoon.daemon import (
    branches,
    commands,
    events,
    files,
    packs,
    ports,
    problems,
    runs,
    sandboxes,
    snapshots,
    store,
    streams,
    system,
    upkeep,
    volumes,
    workspaces,
)
from ratoon.daemon.auth import Guard
from ratoon.daemon.context import Daemon
from ratoon.daemon.limits import Limits
from ratoon.daemon.logs import AuditLog, Watch
from ratoon.daemon.settings import Settings
from ratoon.engine.sandbox.engine import Engine
from ratoon.version import __version__

_SUBJECTS = (
    *(system, store, upkeep, snapshots, packs, sandboxes, runs, branches),
    *(commands, files, ports, streams, workspaces, events, volumes),
)


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """An ASGI application for `engine`, which must stay open for as long as it is used."""
    settings = settings or Settings()
    daemon = Daemon(engine, settings)
    audit = AuditLog(settings.audit_log) if settings.audit_log else None
    app = FastAPI(
        title="Ratoon",
        version=__version__,
        description="Forks microVMs: snapshots, sandboxes, and chains of them.",
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        middleware=[
            Middleware(Watch, metrics=daemon.metrics, audit=audit),
            Middleware(Guard, token=settings.token),
            Middleware(
                Limits, body_bytes=settings.max_body_bytes, seconds=settings.request_seconds
            ),
        ],
    )
    app.state.daemon = daemon
    problems.install(app)
    for subject in _SUBJECTS:
        app.include_router(subject.router)
    return app
