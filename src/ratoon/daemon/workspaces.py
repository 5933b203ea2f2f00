"""The routes of workspaces."""

from __future__ import annotations

from fastapi import APIRouter, Response

from ratoon.api.http_only import WorkspaceInfo
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.models.sandboxes import SuspendRequest, WorkspaceRequest
from ratoon.daemon.problems import error_responses
from ratoon.daemon.sandboxes import options_of, tell_unsynced

router = APIRouter(tags=["workspaces"])


@router.get("/v1/workspaces", responses=error_responses(409), response_model_exclude_none=True)
async def list_workspaces(daemon: TheDaemon) -> list[WorkspaceInfo]:
    """All workspaces."""
    return await daemon.workspaces.list()


@router.post(
    "/v1/workspaces",
    status_code=201,
    responses=error_responses(400, 404, 409, 503),
    response_model_exclude_none=True,
)
async def create_workspace(body: WorkspaceRequest, daemon: TheDaemon) -> WorkspaceInfo:
    """Fork a snapshot, and give what becomes of the sandbox a name."""
    return await daemon.workspaces.create(body.name, body.snapshot_tag, options_of(body))


@router.get(
    "/v1/workspaces/{name}", responses=error_responses(404, 409), response_model_exclude_none=True
)
async def get_workspace(name: str, daemon: TheDaemon) -> WorkspaceInfo:
    """One workspace."""
    return await daemon.workspaces.get(name)


@router.delete("/v1/workspaces/{name}", status_code=204, responses=error_responses(404, 409))
async def delete_workspace(name: str, daemon: TheDaemon, response: Response) -> None:
    """Remove a workspace, its sandbox, and the snapshot that it was suspended to.

    The header `Ratoon-Unsynced` is as with a sandbox.
    """
    tell_unsynced(response, await daemon.workspaces.delete(name))


@router.post(
    "/v1/workspaces/{name}/suspend",
    responses=error_responses(400, 404, 409, 503, 507),
    response_model_exclude_none=True,
)
async def suspend_workspace(
    name: str, daemon: TheDaemon, body: SuspendRequest | None = None
) -> WorkspaceInfo:
    """Branch a workspace's sandbox, and end it. What it was suspended to before is deleted."""
    diff = body is not None and body.diff
    return await daemon.workspaces.suspend(name, "diff" if diff else "full")


@router.post(
    "/v1/workspaces/{name}/resume",
    responses=error_responses(400, 404, 409, 503),
    response_model_exclude_none=True,
)
async def resume_workspace(name: str, daemon: TheDaemon) -> WorkspaceInfo:
    """Fork what a workspace was suspended to; of a stale one, what it was last suspended to."""
    return await daemon.workspaces.resume(name)
