"""The routes of images that are run, and of the starts that are kept of that."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Request

from ratoon.api.starts import DifferenceInfo, Explanation, PrunedStart, StartInfo
from ratoon.daemon.context import Daemon, TheDaemon
from ratoon.daemon.forkd import RunInfo
from ratoon.daemon.host_files import image_roots, require_allowed
from ratoon.daemon.models.runs import PruneRequest, RunRequest
from ratoon.daemon.ports import held_ports
from ratoon.daemon.problems import error_responses
from ratoon.daemon.requests import while_connected
from ratoon.daemon.sandboxes import options_of, summarise
from ratoon.daemon.snapshots import telling
from ratoon.engine.startup.cache import Damaged, Entry, StartCache, tag_of
from ratoon.engine.startup.key import differences, unfit
from ratoon.engine.startup.prune import prune
from ratoon.engine.startup.spec import RunSpec
from ratoon.errors import NotFound, RatoonError
from ratoon.units import MIB

router = APIRouter(tags=["runs"])

Name = Annotated[str, Query(max_length=100, description="The first digits of its key, or its tag.")]


@router.post("/v1/runs", status_code=201, responses=error_responses(400, 404, 409, 502, 503, 507))
async def run_image(body: RunRequest, daemon: TheDaemon, request: Request) -> RunInfo:
    """Run an image in a sandbox: forked from what was kept of an equal run, or booted now.

    Events of kind `progress`, with the image for a snapshot, tell how far it is. If the client goes
    away, it is given up.
    """
    spec = RunSpec(
        image=body.image,
        command=tuple(body.command),
        entrypoint=None if body.entrypoint is None else tuple(body.entrypoint),
        init=body.init,
        ram_bytes=body.ram_mib * MIB,
        vcpus=body.vcpus,
        disk_bytes=body.disk_mib * MIB,
        cpu=body.cpu,
        health=body.health,
    )
    options = options_of(body)
    require_allowed(daemon, request, options)
    with (
        held_ports(daemon.engine, body.publish) as ports,  # before a boot that may take long
        telling(daemon, body.image) as progress,
    ):
        work = daemon.runner.run(
            spec,
            options,
            start=body.start,
            cache=body.cache,
            refresh=body.refresh,
            roots=image_roots(daemon, request),
            progress=progress,
        )
        run = await while_connected(request, work)
        for port in ports:
            run.sandbox.publish(port)
    daemon.metrics.forked(run.sandbox.stages, run.sandbox.fork_ms)
    return RunInfo(
        sandbox=summarise(run.sandbox),
        argv=[*run.argv],
        pid=run.pid,
        tier=run.tier,
        missed=[*run.missed],
        stages_ms=run.stages,
    )


@router.get("/v1/cache", responses=error_responses())
async def list_starts(daemon: TheDaemon) -> list[StartInfo]:
    """The starts that are kept, the last made first."""
    return await asyncio.to_thread(_list, daemon)


@router.get("/v1/cache/explain", responses=error_responses(400, 404, 409))
async def explain_start(one: Name, daemon: TheDaemon, other: Name | None = None) -> Explanation:
    """In which fields a start differs from an `other`, or from the one that is most like it."""
    return await asyncio.to_thread(_explain, daemon.runner.cache, one, other)


@router.post("/v1/cache/prune", responses=error_responses(400, 409))
async def prune_starts(daemon: TheDaemon, body: PruneRequest | None = None) -> list[PrunedStart]:
    """Remove starts, and their snapshots. Sandboxes are not affected."""
    body = body or PruneRequest()
    gone = await prune(
        daemon.engine,
        daemon.runner.cache,
        older_than=body.older_than_seconds,
        everything=body.everything,
        dry_run=body.dry_run,
    )
    return [PrunedStart(key=each.key, snapshot_tag=each.tag, why=each.why) for each in gone]


def _list(daemon: Daemon) -> list[StartInfo]:
    return [_start(daemon, each) for each in daemon.runner.cache.everything()]


def _start(daemon: Daemon, each: Entry | Damaged) -> StartInfo:
    cache = daemon.runner.cache
    if isinstance(each, Damaged):
        return StartInfo(
            key=each.key,
            tier=None,
            image=None,
            command=[],
            snapshot_tag=tag_of(each.key),
            pid=None,
            created_at_unix=None,
            used_at_unix=cache.used_at(each.key),
            layer_bytes=None,
            unusable=each.reason,
            stages_ms={},
            document=None,
        )
    gone, strange = cache.gone(each), unfit(each.document)
    return StartInfo(
        key=each.key,
        tier=each.document.tier,
        image=each.image,
        command=[*each.command],
        snapshot_tag=each.snapshot.tag,
        pid=each.pid,
        created_at_unix=each.created_at_unix,
        used_at_unix=cache.used_at(each.key),
        layer_bytes=None if gone else _layer_bytes(daemon, each.snapshot.tag),
        unusable=gone or (f"this host cannot load it: {strange[0]}" if strange else None),
        stages_ms=each.stages_ms,
        document=each.document.model_dump(mode="json"),
    )


def _layer_bytes(daemon: Daemon, tag: str) -> int | None:
    try:
        own = daemon.engine.store.get(tag).manifest.layers[-1]
    except RatoonError:  # it went just now
        return None
    return own.memory.size + own.disk.size


def _explain(cache: StartCache, name: str, other: str | None) -> Explanation:
    one = cache.named(name)
    if other is not None:
        two = cache.named(other)
    else:
        near = cache.nearest(one.document)
        if near is None:
            raise NotFound(f"there is no other start of tier {one.document.tier} to compare with")
        two = near[0]
    return Explanation(
        one=one.key,
        other=two.key,
        differences=[
            DifferenceInfo(field=each.field, one=each.one, other=each.other)
            for each in differences(one.document, two.document)
        ],
    )
