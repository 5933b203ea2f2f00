"""The routes of named volumes."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from ratoon.api.answers import VolumeInfo
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.models.store import CreateVolume
from ratoon.daemon.problems import error_responses
from ratoon.errors import InvalidInput
from ratoon.machine.volumes import named
from ratoon.machine.volumes.holds import only_ours

router = APIRouter(tags=["volumes"])


@router.get("/v1/volumes", responses=error_responses())
async def list_volumes(daemon: TheDaemon) -> list[VolumeInfo]:
    """All named volumes."""
    return await asyncio.to_thread(named.listed, daemon.engine.store.home)


@router.post("/v1/volumes", status_code=201, responses=error_responses(400, 409))
async def create_volume(body: CreateVolume, daemon: TheDaemon) -> VolumeInfo:
    """Make a named volume, which is empty. A fork that names one makes it, too."""
    home = daemon.engine.store.home
    return await asyncio.to_thread(named.create, home, _checked(body.name))


@router.delete("/v1/volumes/{name}", status_code=204, responses=error_responses(400, 404, 409))
async def remove_volume(name: str, daemon: TheDaemon) -> None:
    """Remove a named volume and all its files; not while a sandbox may write to it."""
    home = daemon.engine.store.home
    await asyncio.to_thread(named.remove, home, _checked(name), only_ours)


def _checked(name: str) -> str:
    try:
        named.check_name(name)
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    return name
