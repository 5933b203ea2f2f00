"""The answers of routes that the library does not call: they are for those who speak HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Health:
    ok: bool


@dataclass(frozen=True)
class Version:
    version: str
    api: Literal["v1"] = "v1"


@dataclass(frozen=True, kw_only=True)
class Pong:
    """`pid` is the agent's, in the guest."""

    pong: Literal[True] = True
    pid: int
    agent_lang: Literal["python"] = "python"
    protocol: int


@dataclass(frozen=True)
class ExecAnswer:
    """How a command ended.

    `exit_code` is a shell's: 124 timed out, 126 not executable, 127 not found, 128 + n killed by
    signal n. `reason` says so in words where it is not the command's own; that is in `stderr` too.
    Output that is not UTF-8 has replacement characters; what is beyond the limit is `truncated`.
    """

    stdout: str
    stderr: str
    exit_code: int
    timed_out: bool
    truncated: bool
    reason: str | None


@dataclass(frozen=True)
class Written:
    """`size_bytes`: of what was sent."""

    size_bytes: int


#: `stale`: its sandbox is gone, with what was not suspended.
WorkspaceStatus = Literal["running", "suspended", "stale"]


@dataclass(frozen=True, kw_only=True)
class WorkspaceInfo:
    """A workspace: `current_state_tag` is the snapshot that it was last suspended to.

    `unsynced`, in the answer to that: why its volumes may lack what its guest had written.
    """

    id: str
    name: str
    source_snapshot_tag: str
    current_state_tag: str | None = None
    status: WorkspaceStatus
    live_sandbox_id: str | None = None
    created_at_unix: int
    last_active_unix: int
    unsynced: str | None = None
