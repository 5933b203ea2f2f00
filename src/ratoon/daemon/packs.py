"""The routes of packs: a snapshot with its whole chain, from one store to another.

Whoever made a pack is trusted by those who fork what comes of it: it has a guest's memory, and a
device state that QEMU parses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from ratoon.api.snapshots import Unpacked
from ratoon.concurrency import in_thread
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.files import BYTES, UPLOAD, content
from ratoon.daemon.problems import error_responses
from ratoon.daemon.requests import draining
from ratoon.daemon.responses import Pieces
from ratoon.daemon.snapshots import check_exists, summarise
from ratoon.store.pack.pack import pack
from ratoon.store.pack.unpack import unpack

router = APIRouter(tags=["packs"])

PIECE = 1024 * 1024


@router.get(
    "/v1/snapshots/{tag}/pack",
    response_class=Response,
    responses=content(BYTES, error_responses(404, 409)),
)
async def pack_snapshot(tag: str, daemon: TheDaemon) -> Response:
    """A snapshot and its whole chain in one file, once all of it has been checked."""
    store = daemon.engine.store
    async with AsyncExitStack() as held:
        file = held.enter_context(store.scratch()) / "pack"
        await in_thread(pack, store, check_exists(tag), file)
        return await Pieces.begin(_read(file), held, media_type=BYTES)
    raise AssertionError


@router.post(
    "/v1/unpack",
    status_code=201,
    responses=error_responses(400, 409),
    response_model_exclude_none=True,
    **UPLOAD,
)
async def unpack_snapshot(
    request: Request,
    daemon: TheDaemon,
    tag: Annotated[str | None, Query(description="Another name than its own.")] = None,
    force: bool = False,
) -> Unpacked:
    """Verify the pack that is the body, and make the snapshot in it one of the store.

    `force` replaces the snapshot that has the name.
    """
    store = daemon.engine.store
    with store.scratch() as room:
        async with draining(request) as body:
            await _write(room / "pack", body)
            done = await in_thread(unpack, store, room / "pack", tag, force=force)
    daemon.engine.events.tell("snapshot_ready", snapshot=done.snapshot.manifest.tag)
    return Unpacked(
        snapshot=summarise(done.snapshot), stored_bytes=done.stored, shared_bytes=done.shared
    )


async def _read(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while piece := await asyncio.to_thread(file.read, PIECE):
            yield piece


async def _write(path: Path, pieces: AsyncIterator[bytes]) -> None:
    with path.open("wb") as file:
        async for piece in pieces:
            await asyncio.to_thread(file.write, piece)
