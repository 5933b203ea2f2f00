"""The routes about the store as a whole: how snapshots relate, what they take, what is damaged."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict

from fastapi import APIRouter, Response

from ratoon.api.answers import PoolInfo
from ratoon.api.snapshots import Differences, LineageNode
from ratoon.api.store import CheckReport, DiskUsage, Finding, StoreUsage
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.models.store import CheckRequest, PoolRequest
from ratoon.daemon.problems import error_responses
from ratoon.daemon.responses import AsciiJson
from ratoon.daemon.snapshots import check_exists
from ratoon.errors import InvalidInput
from ratoon.store.check.check import check_store
from ratoon.store.check.scrub import EVERYTHING, Slice
from ratoon.store.snapshot.diff import Difference, diff
from ratoon.store.snapshot.lineage import lineage
from ratoon.store.snapshot.usage import Usage, snapshot_usage, usage

router = APIRouter(tags=["store"])


@router.get("/v1/lineage", responses=error_responses())
async def show_lineage(daemon: TheDaemon) -> list[LineageNode]:
    """All snapshots, each followed by those that were made on it."""
    return [*await asyncio.to_thread(lineage, daemon.engine.store)]


@router.get(
    "/v1/snapshots/{tag}/diff/{other}",
    response_model=Differences,
    responses=error_responses(404, 409, 507),
)
async def show_difference(tag: str, other: str, daemon: TheDaemon) -> Response:
    """What differs from one snapshot to another: pages, bytes of the disk, files on it."""
    for each in (tag, other):
        check_exists(each)
    found = await asyncio.to_thread(diff, daemon.engine.store, tag, other)
    return AsciiJson({**asdict(found), "files": _files(found)})


@router.get("/v1/usage", responses=error_responses())
async def show_usage(daemon: TheDaemon) -> StoreUsage:
    """What everything takes on the disk."""
    whole = await asyncio.to_thread(usage, daemon.engine.store)
    return StoreUsage(
        total_bytes=whole.total,
        snapshots={name: _usage(each) for name, each in whole.snapshots.items()},
        images={name: _usage(each) for name, each in whole.images.items()},
        sandboxes={name: _usage(each) for name, each in whole.sandboxes.items()},
        volumes={name: _usage(each) for name, each in whole.volumes.items()},
        other=_usage(whole.other),
    )


@router.get("/v1/snapshots/{tag}/usage", responses=error_responses(404, 409))
async def show_snapshot_usage(tag: str, daemon: TheDaemon) -> DiskUsage:
    """What one snapshot takes on the disk."""
    check_exists(tag)
    return _usage(await asyncio.to_thread(snapshot_usage, daemon.engine.store, tag))


@router.post("/v1/check", responses=error_responses(400, 409, 503))
async def check(daemon: TheDaemon, body: CheckRequest | None = None) -> CheckReport:
    """Check the store. What is found is the answer; an error is that it could not be checked."""
    body = body or CheckRequest()
    if body.subset and not body.read_data:
        raise InvalidInput("subset is a part of the data: ask for read_data too")
    part = (Slice.parse(body.subset) if body.subset else EVERYTHING) if body.read_data else None
    with daemon.checks.take():
        report = await asyncio.to_thread(check_store, daemon.engine.store, read_data=part)
    return CheckReport(
        sound=report.sound,
        findings=[
            Finding(
                severity=found.severity.value,
                kind=found.kind.value,
                snapshot=found.snapshot,
                file=str(found.file),
                page=found.page,
                what=found.what,
                way_out=found.way_out,
            )
            for found in report.findings
        ],
        snapshots=report.snapshots,
        images=report.images,
        bytes_read=report.bytes_read,
        in_use=[str(path) for path in report.in_use],
    )


@router.get("/v1/pool", responses=error_responses())
async def show_pool(daemon: TheDaemon) -> list[PoolInfo]:
    """The machines that wait to become sandboxes."""
    return [*daemon.engine.pool.status()]


@router.put("/v1/pool/{tag}", responses=error_responses(400, 404, 409, 503))
async def keep_pool(tag: str, body: PoolRequest, daemon: TheDaemon) -> list[PoolInfo]:
    """Have so many machines of a snapshot wait, from soon on. Forks take them, and are quicker."""
    snapshot = daemon.engine.store.get(check_exists(tag))
    await daemon.engine.pool.keep(snapshot, body.size)
    return await show_pool(daemon)


def _usage(each: Usage) -> DiskUsage:
    return DiskUsage(own_bytes=each.own, shared_bytes=each.shared, total_bytes=each.total)


def _files(difference: Difference) -> dict[str, object] | None:
    if difference.files is None:
        return None
    return {
        "added": [f"/{os.fsdecode(path)}" for path in difference.files.added],
        "removed": [f"/{os.fsdecode(path)}" for path in difference.files.removed],
        "changed": [
            {"path": f"/{os.fsdecode(each.path)}", "what": list(each.what)}
            for each in difference.files.changed
        ],
    }
