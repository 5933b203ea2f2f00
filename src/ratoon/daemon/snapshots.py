"""The routes of snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ratoon.api.snapshots import SnapshotDetail, SnapshotInfo
from ratoon.artifacts import Progress
from ratoon.daemon.context import Daemon, TheDaemon
from ratoon.daemon.forkd import TAKEN, SnapshotRequest
from ratoon.daemon.host_files import image_roots
from ratoon.daemon.models.snapshots import CompactRequest
from ratoon.daemon.problems import error_response, error_responses
from ratoon.daemon.requests import Flag, while_connected
from ratoon.engine.sandbox.base import Built
from ratoon.engine.sandbox.branch import Branched, PendingSnapshot
from ratoon.engine.sandbox.stages import STANDING_STILL, sum_ms
from ratoon.errors import InvalidInput, NotFound
from ratoon.machine.network.policy import NetworkPolicy
from ratoon.machine.vmm.cpu import describe
from ratoon.store.snapshot.manifest import check_tag
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import BrokenSnapshot
from ratoon.units import MIB

router = APIRouter(tags=["snapshots"])

#: The stages of a branch that make the difference.
WRITING = ("scan", "copy", "pack", "digest", "publish")


def check_exists(tag: str) -> str:
    """The tag; NotFound if it can be none: then it is no snapshot's."""
    try:
        check_tag(tag)
    except InvalidInput as error:
        raise NotFound(f"no snapshot {tag!r}: {error}") from None
    return tag


@router.get("/v1/snapshots", responses=error_responses(), response_model_exclude_none=True)
async def list_snapshots(daemon: TheDaemon) -> list[SnapshotInfo]:
    """All snapshots, those that are being written and those that failed included."""
    store = daemon.engine.store
    entries = await asyncio.to_thread(store.list)
    found = {
        **{live.tag: _writing(daemon, live) for live in daemon.engine.writing},
        **{info.tag: info for info in (_listed(daemon, entry) for entry in entries)},
    }
    return [found[tag] for tag in sorted(found)]


@router.post(
    "/v1/snapshots",
    status_code=201,
    response_model=SnapshotInfo,
    responses=error_responses(400, 404, 409, 502),
    response_model_exclude_none=True,
)
async def make_snapshot(
    body: SnapshotRequest, daemon: TheDaemon, request: Request
) -> SnapshotInfo | JSONResponse:
    """Boot an image cold and publish it as a base. A tag that is taken is a 400 here.

    Events of kind `progress` tell how far it is. If the client goes away, it is given up.
    """
    try:
        built = await while_connected(request, _made(body, daemon, request))
    except TAKEN as error:
        return error_response(400, str(error), type(error).__name__)
    daemon.engine.events.tell("snapshot_ready", snapshot=body.tag)
    return summarise_branch(built.branched, measured=False)


async def _made(body: SnapshotRequest, daemon: Daemon, request: Request) -> Built:
    """The base that is asked for."""
    engine, network = daemon.engine, NetworkPolicy.parse(body.network)
    with telling(daemon, body.tag) as progress:
        if body.image is not None:
            return await engine.bases.from_image(
                body.image,
                body.tag,
                ram_bytes=body.ram_mib * MIB,
                vcpus=body.vcpus,
                disk_bytes=body.disk_mib * MIB,
                cpu=body.cpu,
                network=network,
                refresh=body.refresh,
                roots=image_roots(daemon, request),
                progress=progress,
            )
        assert body.kernel is not None
        assert body.rootfs is not None
        return await engine.bases.from_files(
            Path(body.kernel),
            Path(body.rootfs),
            body.tag,
            roots=daemon.settings.image_roots,
            ram_bytes=body.ram_mib * MIB,
            vcpus=body.vcpus,
            cpu=body.cpu,
            network=network,
            progress=progress,
        )


@router.get(
    "/v1/snapshots/{tag}", responses=error_responses(404, 409), response_model_exclude_none=True
)
async def get_snapshot(tag: str, daemon: TheDaemon) -> SnapshotInfo:
    """One snapshot."""
    return find(daemon, tag)


@router.get(
    "/v1/snapshots/{tag}/info",
    responses=error_responses(404, 409),
    response_model_exclude_none=True,
)
async def snapshot_info(tag: str, daemon: TheDaemon) -> SnapshotDetail:
    """All about one snapshot."""
    check_exists(tag)
    return await asyncio.to_thread(daemon.engine.store.info, tag)


@router.delete("/v1/snapshots/{tag}", status_code=204, responses=error_responses(400, 404, 409))
async def delete_snapshot(
    tag: str, daemon: TheDaemon, cascade: Flag = False, force: Flag = False
) -> None:
    """Delete a snapshot: with `cascade` what was made from it too, with `force` it alone."""
    await daemon.engine.delete(check_exists(tag), force=force, cascade=cascade)


@router.post(
    "/v1/snapshots/{tag}/compact",
    responses=error_responses(400, 404, 409),
    response_model_exclude_none=True,
)
async def compact_snapshot(tag: str, request: CompactRequest, daemon: TheDaemon) -> SnapshotInfo:
    """Make `to`, an equal snapshot that stands on no other."""
    with telling(daemon, request.to) as progress:
        made = await daemon.engine.compact(check_exists(tag), request.to, progress=progress)
    return summarise(made)


@contextmanager
def telling(daemon: Daemon, tag: str) -> Iterator[Progress]:
    """Tells those who listen to events how far the making of a snapshot, or a run, is."""
    loop = asyncio.get_running_loop()
    with daemon.engine.events.making(tag) as tell:

        def progress(message: str) -> None:
            loop.call_soon_threadsafe(tell, message)  # it is called in threads too

        yield progress


def find(daemon: Daemon, tag: str) -> SnapshotInfo:
    """A snapshot of any status. NotFound."""
    for live in daemon.engine.writing:
        if live.tag == tag and live.status != "ready":
            return _writing(daemon, live)
    return summarise(daemon.engine.store.get(check_exists(tag)))


def _listed(daemon: Daemon, entry: Snapshot | BrokenSnapshot) -> SnapshotInfo:
    if isinstance(entry, Snapshot):
        return summarise(entry)
    path = daemon.engine.store.snapshots / entry.tag
    return SnapshotInfo(
        tag=entry.tag,
        dir=str(path),
        created_at_unix=0,
        status="failed",
        bootable=False,
        error=str(entry.error),
    )


def summarise(entry: Snapshot) -> SnapshotInfo:
    """A snapshot that was published."""
    manifest = entry.manifest
    memory = manifest.layers[-1].memory
    size = memory.size if manifest.parent else None
    return SnapshotInfo(
        tag=manifest.tag,
        dir=str(entry.path),
        created_at_unix=int(manifest.created_at_unix),
        status="ready",
        bootable=True,
        branched_from=manifest.branched_from,
        parent_tag=manifest.parent.tag if manifest.parent else None,
        pause_ms=sum_ms(manifest.stages, STANDING_STILL),
        diff_ms=sum_ms(manifest.stages, WRITING) if manifest.parent else None,
        diff_physical_bytes=size,
        diff_logical_bytes=size,
        chain_depth=entry.depth,
        memory_root=manifest.memory_root,
        ram_bytes=manifest.machine.ram_bytes,
        accelerator=manifest.machine.accelerator,
        cpu=describe(manifest.machine.cpu),
        pages=memory.entries,
        layer_bytes=memory.size,
        stages_ms=manifest.stages,
        warning=manifest.warning,
    )


def summarise_branch(branched: Branched, *, measured: bool) -> SnapshotInfo:
    """One that was just made; `measured`: with what its difference took, whatever it is."""
    info = summarise(branched.snapshot)
    if not measured:
        return info
    size = branched.difference_bytes
    return replace(
        info,
        diff_physical_bytes=size,
        diff_logical_bytes=size,
        diff_ms=sum_ms(branched.stages, WRITING) or 0.0,
    )


def _writing(daemon: Daemon, live: PendingSnapshot) -> SnapshotInfo:
    return SnapshotInfo(
        tag=live.tag,
        dir=str(daemon.engine.store.snapshots / live.tag),
        created_at_unix=int(live.began_at_unix),
        status=live.status,
        bootable=False,
        pause_ms=live.pause_ms,
        error=live.reason if live.status == "failed" else None,
    )
