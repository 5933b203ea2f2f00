"""The routes about the daemon itself."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ratoon.api.http_only import Health, Version
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.problems import error_response, error_responses
from ratoon.machine.vmm.command import BINARY
from ratoon.version import __version__

router = APIRouter(tags=["system"])


@router.get("/healthz", response_model=Health, responses={503: error_responses(503)[503]})
async def health(daemon: TheDaemon) -> Health | JSONResponse:
    """Whether the daemon can do its work: start machines, and write to its store. No token."""
    if problem := await asyncio.to_thread(_problem, daemon.engine.store.home):
        return error_response(503, problem, "HostError")
    return Health(ok=True)


def _problem(home: Path) -> str | None:
    if not shutil.which(BINARY):
        return f"{BINARY} is not installed"
    try:
        with tempfile.TemporaryFile(dir=home, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        return f"the store cannot be written to: {error.strerror}"
    return None


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        **error_responses(),
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Metrics."},
    },
)
async def metrics(daemon: TheDaemon) -> Response:
    """What is counted and measured, as Prometheus reads it."""
    return Response(daemon.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version", responses=error_responses())
async def version() -> Version:
    """Which Ratoon this is, and which interface it has."""
    return Version(version=__version__)
