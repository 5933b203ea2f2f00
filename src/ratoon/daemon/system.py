"""The routes about the daemon itself."""

from __future__ import annotations

from fastapi import APIRouter

import ratoon
from ratoon.daemon.models.common import Health, Version
from ratoon.daemon.problems import answers

router = APIRouter(tags=["system"])


@router.get("/healthz")
async def health() -> Health:
    """Whether the daemon can do its work. Needs no token."""
    return Health(ok=True)


@router.get("/version", responses=answers())
async def version() -> Version:
    """Which Ratoon this is, and which interface it has."""
    return Version(version=ratoon.__version__)
