"""The routes of sandboxes: forks of snapshots, and what becomes of them."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ratoon.daemon.connection import while_connected
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.models import Failures, ForkOptions, ForkRequest, Pong, SandboxInfo
from ratoon.daemon.problems import answers, error_answer
from ratoon.errors import GuestError, RatoonError
from ratoon.sandbox.options import SandboxOptions
from ratoon.sandbox.sandbox import Sandbox

router = APIRouter(tags=["sandboxes"])

#: Seconds a guest may take to answer a ping.
PING_TIMEOUT = 10.0


@router.post("/v1/sandboxes", status_code=201, responses=answers(400, 404, 409, 503))
async def fork(
    body: ForkRequest, daemon: TheDaemon, request: Request, response: Response
) -> list[SandboxInfo]:
    """Fork a snapshot `n` times. The agent of each sandbox has answered.

    Where some of them did not start, the header `Ratoon-Failed` says how many, and
    `/v1/sandboxes/failures` why.
    """
    made = await while_connected(
        request, daemon.engine.fork(body.snapshot_tag, body.n, _options(body))
    )
    alive = [each for each in made if isinstance(each, Sandbox)]
    failures = [each for each in made if isinstance(each, RatoonError)]
    if failures:
        daemon.failures = body.snapshot_tag, failures
        if not alive:
            raise failures[0]
        response.headers["Ratoon-Failed"] = str(len(failures))
    return [summarise(each) for each in alive]


@router.get("/v1/sandboxes", responses=answers())
async def list_sandboxes(daemon: TheDaemon) -> list[SandboxInfo]:
    """All sandboxes."""
    return [summarise(each) for each in daemon.engine.sandboxes]


@router.get("/v1/sandboxes/failures", responses=answers())
async def failures(daemon: TheDaemon) -> Failures:
    """Why sandboxes of the last fork that failed, or failed in part, did not start."""
    tag, errors = daemon.failures
    return Failures(snapshot_tag=tag, errors=[error_answer(each) for each in errors])


@router.get("/v1/sandboxes/{sandbox_id}", responses=answers(404))
async def get_sandbox(sandbox_id: str, daemon: TheDaemon) -> SandboxInfo:
    """One sandbox."""
    return summarise(daemon.engine.get(sandbox_id))


@router.delete("/v1/sandboxes/{sandbox_id}", status_code=204, responses=answers(404))
async def kill(sandbox_id: str, daemon: TheDaemon) -> None:
    """End a sandbox, and remove all it had."""
    await daemon.engine.get(sandbox_id).kill()


@router.post("/v1/sandboxes/{sandbox_id}/ping", responses=answers(404, 409))
async def ping(sandbox_id: str, daemon: TheDaemon) -> Pong:
    """Ask a sandbox's agent whether it is there. A body is ignored."""
    sandbox = daemon.engine.get(sandbox_id)
    reply = await sandbox.request("hello", timeout=PING_TIMEOUT)
    pid, version = reply.get("pid"), reply.get("version")
    if type(pid) is not int or type(version) is not int:
        raise GuestError(f"the agent of {sandbox.id} gave no pid")
    return Pong(pid=pid, protocol=version)


def _options(body: ForkOptions) -> SandboxOptions:
    return SandboxOptions(
        ttl_seconds=body.ttl_seconds, idle_seconds=body.idle_seconds, metadata=body.metadata
    )


def summarise(sandbox: Sandbox) -> SandboxInfo:
    """A sandbox as the API shows it."""
    options = sandbox.options
    assert sandbox.parent is not None, "only a base's own boot has no parent"
    assert sandbox.snapshot_tag is not None
    branched = sandbox.last_branch_memory
    return SandboxInfo(
        id=sandbox.id,
        snapshot_tag=sandbox.snapshot_tag,
        netns=None,
        guest_addr=None,
        created_at_unix=int(sandbox.created_at_unix),
        pid=sandbox.pid if sandbox.state == "running" else None,
        memory_limit_mib=None,
        has_branched=sandbox.branch_count > 0,
        last_branch_memory_path=str(branched) if branched else None,
        branch_count=sandbox.branch_count,
        state=sandbox.state,
        accelerator=sandbox.parent.manifest.machine.accelerator,
        ttl_seconds=options.ttl_seconds,
        idle_seconds=options.idle_seconds,
        metadata=options.metadata,
        fork_ms=sandbox.fork_ms,
        stages_ms=sandbox.stages,
    )
