"""The routes of commands in a sandbox that are answered when they have ended."""

from __future__ import annotations

from fastapi import APIRouter, Request

from ratoon.daemon.connection import while_connected
from ratoon.daemon.context import TheDaemon
from ratoon.daemon.models import ExecAnswer, ExecRequest
from ratoon.daemon.problems import answers
from ratoon.guest import commands

router = APIRouter(tags=["commands"])

#: Bytes of stdout, and of stderr, that an answer holds; a stream has no such limit.
OUTPUT_LIMIT = 8 * 1024 * 1024


@router.post("/v1/sandboxes/{sandbox_id}/exec", responses=answers(400, 404, 409))
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
