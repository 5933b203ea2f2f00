"""The routes that keep a store small: pruning snapshots, and compressing their memory layers."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter

from ratoon.api.upkeep import CompressReport, PruneBudget, PruneReport, PruneVerdict
from ratoon.concurrency import in_thread
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.models.upkeep import CompressRequest, PruneRequest
from ratoon.daemon.problems import error_responses
from ratoon.daemon.snapshots import check_exists
from ratoon.engine.sandbox.prune import prune
from ratoon.store.snapshot.compress import rewrite_layers
from ratoon.store.snapshot.retention import Rules

router = APIRouter(tags=["store"])


@router.post("/v1/prune", responses=error_responses(400, 404, 409))
async def prune_snapshots(body: PruneRequest, daemon: TheDaemon) -> PruneReport:
    """Delete the snapshots that the rules do not keep, or tell which those are.

    What a sandbox or a workspace needs is kept, and what anything that is kept was made from.
    """
    rules = Rules(
        keep_last=body.keep_last,
        keep_within=body.keep_within_seconds,
        max_bytes=body.max_bytes,
        keep=tuple(body.keep),
        lineage=body.lineage,
    )
    users = daemon.workspaces.snapshots()
    done = await prune(daemon.engine, rules, users, dry_run=body.dry_run)
    return PruneReport(
        dry_run=body.dry_run,
        snapshots=[
            PruneVerdict(
                tag=each.tag,
                lineage=each.lineage,
                created_at_unix=int(each.created_at_unix),
                keep=each.keep,
                reason=each.reason,
                frees_bytes=each.frees,
                deleted=each.tag in done.deleted,
                error=done.failed.get(each.tag),
            )
            for each in done.plan.verdicts
        ],
        lineages=[
            PruneBudget(
                lineage=each.lineage,
                bytes_before=each.before,
                bytes_after=each.after,
                excess_bytes=each.excess,
            )
            for each in done.plan.budgets
        ],
        freed_bytes=done.plan.freed,
    )


@router.post("/v1/compress", responses=error_responses(400, 404, 409, 507))
async def compress_layers(daemon: TheDaemon, body: CompressRequest | None = None) -> CompressReport:
    """Compress memory layers where they lie, or have them plain again; all works as before."""
    body = body or CompressRequest()
    work = partial(
        rewrite_layers,
        daemon.engine.store,
        "plain" if body.undo else "compressed",
        [check_exists(tag) for tag in body.tags],
        older_than=body.older_than_seconds,
        level=body.level,
        dry_run=body.dry_run,
    )
    done = await in_thread(work)
    return CompressReport(
        dry_run=body.dry_run,
        layers=[*done],
    )
