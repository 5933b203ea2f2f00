"""The routes of programs and code in a sandbox that are answered when they have ended."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ratoon.api.answers import ProcessInfo
from ratoon.api.http_only import ExecAnswer
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.models.commands import (
    EvalAnswer,
    EvalRequest,
    ExecRequest,
    SignalRequest,
)
from ratoon.daemon.problems import error_responses
from ratoon.daemon.requests import while_connected
from ratoon.machine.guest import commands, evaluation

router = APIRouter(tags=["commands"])

#: Bytes of stdout, and of stderr, that an answer holds; a stream has no such limit.
OUTPUT_LIMIT = 8 * 1024 * 1024


@router.post("/v1/sandboxes/{sandbox_id}/exec", responses=error_responses(400, 404, 409))
async def run(
    sandbox_id: str, body: ExecRequest, daemon: TheDaemon, request: Request
) -> ExecAnswer:
    """Run a program to its end. It is killed when its time is over, or the client goes away."""
    result = await while_connected(
        request,
        commands.exec(
            daemon.engine.get(sandbox_id),
            body.args,
            env=body.env,
            cwd=body.cwd,
            user=body.user,
            stdin=body.stdin.encode(),
            timeout=body.timeout_secs,
            output_limit=OUTPUT_LIMIT,
        ),
    )
    reason = result.error
    if result.timed_out:
        reason = f"{body.args[0]} did not end within {body.timeout_secs:g} s, and was killed"
    stderr = result.stderr.decode(errors="replace")
    if reason:
        stderr += f"{'' if not stderr or stderr.endswith(chr(10)) else chr(10)}ratoon: {reason}\n"
    return ExecAnswer(
        stdout=result.stdout.decode(errors="replace"),
        stderr=stderr,
        exit_code=result.exit_code,
        timed_out=result.timed_out,
        truncated=result.truncated,
        reason=reason,
    )


@router.post("/v1/sandboxes/{sandbox_id}/eval", responses=error_responses(400, 404, 409))
async def evaluate(
    sandbox_id: str, body: EvalRequest, daemon: TheDaemon, request: Request
) -> EvalAnswer:
    """Run Python in the warm interpreter, after what it was given before.

    It is interrupted when its time is over, or the client goes away.
    """
    sandbox = daemon.engine.get(sandbox_id)
    done = await while_connected(
        request,
        evaluation.evaluate(
            sandbox, body.code, timeout=body.timeout_secs, output_limit=OUTPUT_LIMIT
        ),
    )
    return EvalAnswer(
        result=done.result,
        error=done.error,
        exit_code=done.exit_code,
        stdout=done.stdout.decode(errors="replace"),
        stderr=done.stderr.decode(errors="replace"),
        timed_out=done.timed_out,
        state_lost=done.state_lost,
        truncated=done.truncated,
    )


@router.get("/v1/sandboxes/{sandbox_id}/processes", responses=error_responses(404, 409))
async def list_processes(sandbox_id: str, daemon: TheDaemon) -> list[ProcessInfo]:
    """The commands that run, and those in the background of whose end the guest still knows."""
    return await commands.processes(daemon.engine.get(sandbox_id))


@router.post(
    "/v1/sandboxes/{sandbox_id}/processes/{pid}/signal",
    status_code=204,
    responses=error_responses(400, 404, 409),
)
async def signal_process(sandbox_id: str, pid: int, body: SignalRequest, daemon: TheDaemon) -> None:
    """Send a signal to a command's process group; SIGKILL is for all that it has started."""
    await commands.signal(daemon.engine.get(sandbox_id), pid, body.signal)
