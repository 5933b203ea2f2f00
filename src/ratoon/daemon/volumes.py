"""The routes of named volumes, and who may have which directory of the host."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import HTTPConnection

from ratoon.api.answers import VolumeInfo
from ratoon.daemon.context import Daemon, TheDaemon
from ratoon.daemon.models.store import CreateVolume
from ratoon.daemon.problems import error_responses
from ratoon.errors import InvalidInput
from ratoon.sandbox.options import SandboxOptions
from ratoon.volumes import named
from ratoon.volumes.holds import only_ours

router = APIRouter(tags=["volumes"])


def require_allowed(daemon: Daemon, connection: HTTPConnection, options: SandboxOptions) -> None:
    """InvalidInput: who asks may not have such a directory of the host as a volume.

    Who reaches the unix socket is root, and may have any. TCP is for those that lie below a
    directory that was chosen; a volume's source has no symbolic link in it, so names decide.
    """
    server = connection.scope.get("server")
    if not (server and server[1]):  # it has no port
        return
    roots = [root.resolve() for root in daemon.settings.volume_roots]
    for volume in options.volumes:
        if not volume.named and not any(Path(volume.source).is_relative_to(r) for r in roots):
            raise InvalidInput(
                f"{volume.source}: over TCP, this directory of the host is not to be had; "
                "see `serve --volume-root`"
            )


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
