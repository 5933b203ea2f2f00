"""The routes of sandboxes: forks of snapshots, and what becomes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from ratoon.api.answers import LOOPBACK, ListedState, MainCommand, Stopped
from ratoon.api.http_only import Pong
from ratoon.daemon.context import Daemon, TheDaemon
from ratoon.daemon.forkd import Changed, ForkRequest, SandboxInfo
from ratoon.daemon.host_files import require_allowed
from ratoon.daemon.models.sandboxes import (
    Failures,
    ForkOptions,
    ForkSandboxRequest,
    LimitsOfSandbox,
    ManyForks,
    OptionsRequest,
    StopRequest,
    VolumeOfSandbox,
    WaitRequest,
)
from ratoon.daemon.problems import error_answer, error_responses
from ratoon.daemon.requests import Flag, while_connected
from ratoon.daemon.workspace import MARK
from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.engine.sandbox.stages import Stages
from ratoon.errors import GuestError, InvalidInput, RatoonError
from ratoon.jail.layers import layers_of
from ratoon.machine.host.limits import Limits
from ratoon.machine.network.policy import NetworkPolicy
from ratoon.machine.vmm.cpu import describe
from ratoon.units import MIB
from ratoon.validation import first_error

router = APIRouter(tags=["sandboxes"])

#: Seconds a guest may take to answer a ping.
PING_TIMEOUT = 10.0

Outcomes = Sequence[Sandbox | RatoonError]


@router.post("/v1/sandboxes", status_code=201, responses=error_responses(400, 404, 409, 503))
async def fork(
    body: ForkRequest, daemon: TheDaemon, request: Request, response: Response
) -> list[SandboxInfo]:
    """Fork a snapshot `n` times. The agent of each sandbox has answered.

    Where some of them did not start, the header `Ratoon-Failed` says how many, and
    `/v1/sandboxes/failures` why.
    """
    _check_ports(body)
    options = options_of(body, body.memory_limit_mib)
    require_allowed(daemon, request, options)
    work = daemon.engine.fork(body.snapshot_tag, body.n, options)
    return await _forked(daemon, request, response, work, body, body.snapshot_tag)


@router.get("/v1/sandboxes", responses=error_responses(400))
async def list_sandboxes(
    daemon: TheDaemon,
    metadata: Annotated[list[str], Query(description="KEY:VALUE; all of them must be so.")] = [],  # noqa: B006
    state: ListedState | None = None,
) -> list[SandboxInfo]:
    """All sandboxes, or those that are as asked for."""
    wanted = [_pair(each) for each in metadata]
    return [
        summarise(each)
        for each in daemon.engine.sandboxes
        if state in (None, each.state)
        and all(each.options.metadata.get(key) == value for key, value in wanted)
    ]


@router.get("/v1/sandboxes/failures", responses=error_responses())
async def failures(daemon: TheDaemon) -> Failures:
    """Why sandboxes of the last fork that failed, or failed in part, did not start."""
    tag, errors = daemon.failures
    return Failures(snapshot_tag=tag, errors=[error_answer(each) for each in errors])


@router.get("/v1/sandboxes/{sandbox_id}", responses=error_responses(404))
async def get_sandbox(sandbox_id: str, daemon: TheDaemon) -> SandboxInfo:
    """One sandbox."""
    sandbox = daemon.engine.get(sandbox_id)
    found = summarise(sandbox)
    if found.pid:
        with suppress(ProcessLookupError):
            return replace(found, layers=layers_of(found.pid))
    return found


@router.patch("/v1/sandboxes/{sandbox_id}", responses=error_responses(400, 404))
async def change_sandbox(sandbox_id: str, body: OptionsRequest, daemon: TheDaemon) -> SandboxInfo:
    """Change how long a sandbox lives, when it goes to standby, or its metadata."""
    sandbox = daemon.engine.get(sandbox_id)
    given = {name: getattr(body, name) for name in body.model_fields_set}
    sandbox.options = sandbox.options.model_copy(update=given)
    sandbox.persist()
    return summarise(sandbox)


@router.delete("/v1/sandboxes/{sandbox_id}", status_code=204, responses=error_responses(404))
async def kill(sandbox_id: str, daemon: TheDaemon, response: Response, now: Flag = False) -> None:
    """End a sandbox, and remove all it had.

    What its guest has written is in its volumes then; where it may not be, the header
    `Ratoon-Unsynced` says why. `now`: without waiting for that.
    """
    sandbox = daemon.engine.get(sandbox_id)
    await sandbox.kill(now=now)
    tell_unsynced(response, sandbox.unsynced)


@router.post("/v1/sandboxes/{sandbox_id}/wait", responses=error_responses(400, 404, 409))
async def wait(
    sandbox_id: str, daemon: TheDaemon, request: Request, body: WaitRequest | None = None
) -> MainCommand:
    """Wait until the command has ended that a sandbox was made for; that is no use of the sandbox.

    137: it was killed with the sandbox. `ended` is null where the time was over before, or the
    daemon ends.
    """
    sandbox = daemon.engine.get(sandbox_id)
    return await while_connected(request, sandbox.wait((body or WaitRequest()).timeout_secs))


@router.post("/v1/sandboxes/{sandbox_id}/stop", responses=error_responses(400, 404, 409, 503))
async def stop(sandbox_id: str, daemon: TheDaemon, body: StopRequest | None = None) -> Stopped:
    """End a sandbox, as a DELETE does, once its command has ended, as its signal asks it to.

    It has 10 s for that, or as long as is said, with what it leaves behind; what is there then is
    killed. If the client goes away, that goes on.
    """
    sandbox = daemon.engine.get(sandbox_id)
    ended = await sandbox.stop((body or StopRequest()).timeout_secs)
    return Stopped(ended, sandbox.unsynced)


@router.post("/v1/sandboxes/{sandbox_id}/ping", responses=error_responses(404, 409))
async def ping(sandbox_id: str, daemon: TheDaemon) -> Pong:
    """Ask a sandbox's agent whether it is there. A body is ignored."""
    sandbox = daemon.engine.get(sandbox_id)
    reply = await sandbox.request("hello", timeout=PING_TIMEOUT)
    pid, version = reply.get("pid"), reply.get("version")
    if type(pid) is not int or type(version) is not int:
        raise GuestError(f"the agent of {sandbox.id} gave no pid")
    return Pong(pid=pid, protocol=version)


@router.post(
    "/v1/sandboxes/{sandbox_id}/fork",
    status_code=201,
    responses=error_responses(400, 404, 409, 503),
)
async def fork_sandbox(
    sandbox_id: str,
    daemon: TheDaemon,
    request: Request,
    response: Response,
    body: ForkSandboxRequest | None = None,
) -> list[SandboxInfo]:
    """Fork a sandbox as it is now, running or in standby; it goes on. Answers as a fork does."""
    sandbox = daemon.engine.get(sandbox_id)
    body = body or ForkSandboxRequest()
    _check_ports(body)
    given = body.model_fields_set & set(SandboxOptions.model_fields)
    own = {name: getattr(options_of(body), name) for name in given}
    inherited = {key: value for key, value in sandbox.options.metadata.items() if key != MARK}
    options = sandbox.options.model_copy(update={"metadata": inherited, **own})
    require_allowed(daemon, request, options)
    work = daemon.engine.fork_sandbox(sandbox, body.n, options)
    return await _forked(daemon, request, response, work, body, sandbox.snapshot_tag)


@router.post("/v1/sandboxes/{sandbox_id}/standby", responses=error_responses(404, 409, 507))
async def standby(sandbox_id: str, daemon: TheDaemon) -> Changed:
    """Write a sandbox's state to the disk and end its machine. It is resumed on request."""
    sandbox = daemon.engine.get(sandbox_id)
    stages = await daemon.engine.standby(sandbox)
    return _changed(sandbox, stages)


@router.post("/v1/sandboxes/{sandbox_id}/resume", responses=error_responses(404, 409, 503))
async def resume(sandbox_id: str, daemon: TheDaemon) -> Changed:
    """Let a sandbox in standby go on where it was."""
    sandbox = daemon.engine.get(sandbox_id)
    stages = await daemon.engine.resume(sandbox)
    return _changed(sandbox, stages)


@router.post("/v1/sandboxes/{sandbox_id}/reset", responses=error_responses(404, 409, 503))
async def reset(sandbox_id: str, daemon: TheDaemon) -> Changed:
    """Take a running sandbox back to its last branch, or to what it was forked from."""
    sandbox = daemon.engine.get(sandbox_id)
    stages = await daemon.engine.reset(sandbox)
    return _changed(sandbox, stages)


def _changed(sandbox: Sandbox, stages: Stages) -> Changed:
    return Changed(sandbox=summarise(sandbox), stages_ms=stages.ms, unsynced=sandbox.unsynced)


def tell_unsynced(response: Response, problem: str | None) -> None:
    """Have an answer without a body say why volumes may lack what their guest had written."""
    if problem:
        text = problem.encode("ascii", "replace").decode()
        response.headers["Ratoon-Unsynced"] = " ".join(text.split())


async def _forked(
    daemon: Daemon,
    request: Request,
    response: Response,
    work: Coroutine[Any, Any, Outcomes],
    body: ManyForks,
    tag: str | None,
) -> list[SandboxInfo]:
    """The answer to a fork, which is given up if the client goes away."""
    outcomes = await while_connected(request, work)
    alive = [each for each in outcomes if isinstance(each, Sandbox)]
    failed = [each for each in outcomes if isinstance(each, RatoonError)]
    for each in alive:
        daemon.metrics.forked(each.stages, each.fork_ms)
    if failed:
        daemon.metrics.forks.labels("failed").inc(len(failed))
        daemon.failures = tag, failed
        if not alive:
            raise failed[0]
        response.headers["Ratoon-Failed"] = str(len(failed))
    try:
        for sandbox in alive:
            for port in body.publish:
                address = port.address or LOOPBACK
                sandbox.publish(port.guest_port, port.host_port or 0, address)
    except RatoonError:
        await asyncio.gather(*(each.kill() for each in alive))
        raise
    return [summarise(each) for each in alive]


def options_of(body: ForkOptions, memory_limit_mib: int | None = None) -> SandboxOptions:
    """What the engine is to be given for what a client asked for. InvalidInput."""
    limits = body.limits
    memory_mib = limits.memory_mib if limits.memory_mib is not None else memory_limit_mib
    try:
        return SandboxOptions(
            network=None if body.network is None else NetworkPolicy.parse(body.network),
            limits=Limits(
                memory_bytes=_bytes(memory_mib),
                cpus=limits.cpus,
                pids=limits.pids,
                disk_bytes=_bytes(limits.disk_mib),
            ),
            ttl_seconds=body.ttl_seconds,
            idle_seconds=body.idle_seconds,
            idle_counts=body.idle_counts,
            spare=body.spare,
            auto_remove=body.auto_remove,
            stop_signal=body.stop_signal,
            env=body.env,
            user=body.user,
            workdir=body.workdir,
            volumes=tuple(Volume(**each.model_dump()) for each in body.volumes),
            metadata=body.metadata,
        )
    except ValidationError as error:
        raise InvalidInput(first_error(error)) from None


def _check_ports(body: ManyForks) -> None:
    if body.n > 1 and any(each.host_port for each in body.publish):
        raise InvalidInput("a port of the host cannot lead to several sandboxes: leave it out")


def _pair(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not colon:
        raise InvalidInput(f"metadata {text!r}: write KEY:VALUE")
    return key, value


def summarise(sandbox: Sandbox) -> SandboxInfo:
    """A sandbox as the API shows it."""
    record, options = sandbox.record, sandbox.options
    branched = record.last_branch_memory
    stands_on, machine = sandbox.snapshot_tag, sandbox.parent.manifest.machine
    limits = LimitsOfSandbox(
        memory_mib=_mib(options.limits.memory_bytes),
        cpus=options.limits.cpus,
        pids=options.limits.pids,
        disk_mib=_mib(options.limits.disk_bytes),
    )
    return SandboxInfo(
        id=sandbox.id,
        snapshot_tag=record.forked_from or stands_on,
        netns=None,
        guest_addr=None,
        created_at_unix=int(record.created_at_unix),
        pid=sandbox.pid if sandbox.state == "running" else None,
        memory_limit_mib=limits.memory_mib,
        has_branched=record.branch_count > 0,
        last_branch_memory_path=str(branched) if branched else None,
        branch_count=record.branch_count,
        state=sandbox.state,
        status=_status(sandbox),
        command=sandbox.command,
        stands_on=stands_on,
        accelerator=machine.accelerator,
        cpu=describe(machine.cpu),
        network=str(sandbox.network),
        limits=limits,
        ttl_seconds=options.ttl_seconds,
        idle_seconds=options.idle_seconds,
        idle_counts=options.idle_counts,
        idle_for_seconds=sandbox.idle_seconds,
        wakes=_dozes(sandbox),
        spare=options.spare,
        auto_remove=options.auto_remove,
        stop_signal=sandbox.stop_signal,
        volumes=[VolumeOfSandbox(**each.model_dump()) for each in options.volumes],
        metadata=options.metadata,
        ports=[*sandbox.ports],
        fork_ms=sandbox.fork_ms,
        stages_ms=sandbox.stages,
        layers=None,
    )


def _dozes(sandbox: Sandbox) -> bool:
    return sandbox.wakes and sandbox.state == "standby"


def _status(sandbox: Sandbox) -> str:
    """Its state for people, and how its command has ended."""
    how: list[str] = ["standby (idle)" if _dozes(sandbox) else sandbox.state]
    if sandbox.command and sandbox.command.ended:
        ended = f"exited ({sandbox.command.ended.exit_code})"
        how = [ended] if sandbox.state == "running" else [*how, ended]
    return ", ".join(how)


def _bytes(mib: int | None) -> int | None:
    return None if mib is None else mib * MIB


def _mib(size: int | None) -> int | None:
    return None if size is None else size // MIB
