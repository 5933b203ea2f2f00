"""Workspaces."""

from __future__ import annotations

from typing import Literal

from ratoon.daemon.models.common import Answer, Request
from ratoon.daemon.models.sandboxes import ForkOptions

#: `stale`: its sandbox is gone, with what was not suspended.
Status = Literal["running", "suspended", "stale"]


class WorkspaceRequest(ForkOptions):
    """A name, and what its sandbox is forked from. The options hold for those after it, too."""

    name: str
    snapshot_tag: str


class SuspendRequest(Request):
    """`diff`: store what changed, not all of it."""

    diff: bool = False


class WorkspaceInfo(Answer):
    """A workspace: `current_state_tag` is the snapshot that it was last suspended to."""

    id: str
    name: str
    source_snapshot_tag: str
    current_state_tag: str | None = None
    status: Status
    live_sandbox_id: str | None = None
    created_at_unix: int
    last_active_unix: int
