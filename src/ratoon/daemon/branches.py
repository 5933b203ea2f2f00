"""The route of branches: a running sandbox into a new snapshot."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import ExitStack

from fastapi import APIRouter, Response

from ratoon.api.snapshots import SnapshotInfo
from ratoon.daemon import snapshots
from ratoon.daemon.context import Daemon, TheDaemon
from ratoon.daemon.forkd import BranchRequest, mode_of
from ratoon.daemon.models.snapshots import Mode
from ratoon.daemon.problems import error_responses
from ratoon.engine.sandbox.branch import Branched
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import InvalidInput

router = APIRouter(tags=["branches"])


@router.post(
    "/v1/sandboxes/{sandbox_id}/branch",
    status_code=201,
    responses={
        202: {"model": SnapshotInfo, "description": "It is being written."},
        **error_responses(400, 404, 409, 503),
    },
    response_model_exclude_none=True,
)
async def branch(
    sandbox_id: str, daemon: TheDaemon, response: Response, body: BranchRequest | None = None
) -> SnapshotInfo:
    """Publish the state of a running sandbox as a snapshot; it goes on running.

    Without a `tag` it gets one. `parent_tag`, for a diff: the sandbox's snapshot or last branch;
    the answer says which of them it stands on.
    """
    sandbox = daemon.engine.get(sandbox_id)
    body = body or BranchRequest()
    mode = mode_of(body)
    _check_parent(body, mode, sandbox)
    tag = body.tag if body.tag is not None else _automatic_tag(sandbox)
    with ExitStack() as slot:
        slot.enter_context(daemon.branches.take())
        if mode != "live":
            branched = await daemon.engine.branch(sandbox, tag, mode)
            return _made(daemon, mode, branched, measured=body.measure_diff)
        live = await daemon.engine.begin_branch(sandbox, tag)
        if body.wait:
            return _made(daemon, mode, await asyncio.shield(live.done), measured=False)
        slots = slot.pop_all()
        live.done.add_done_callback(lambda done: slots.close())
        response.status_code = 202
        return snapshots.find(daemon, tag)


def _check_parent(body: BranchRequest, mode: Mode, sandbox: Sandbox) -> None:
    if body.parent_tag is None:
        return
    if mode != "diff":
        raise InvalidInput(f"parent_tag is of a diff, but this is a {mode} branch")
    parents = {sandbox.record.forked_from, sandbox.snapshot_tag}
    if body.parent_tag not in parents:
        raise InvalidInput(
            f"sandbox {sandbox.id} is of {' and '.join(sorted(filter(None, parents)))}, "
            f"not of {body.parent_tag}"
        )


def _automatic_tag(sandbox: Sandbox) -> str:
    return f"branch-{sandbox.id}-{int(time.time())}-{secrets.token_hex(2)}"


def _made(daemon: Daemon, mode: Mode, branched: Branched, *, measured: bool) -> SnapshotInfo:
    daemon.metrics.branched(mode, branched.stages, branched.pause_ms)
    return snapshots.summarise_branch(branched, measured=measured)
