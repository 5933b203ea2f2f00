# Made from ../aio/evaluation.py by scripts/make_sync.py: change it there.
"""Python in a sandbox's warm interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ratoon.api.answers import EvalResult
from ratoon.client.output import Output, output_of
from ratoon.client.sync.commands import gather
from ratoon.client.sync.concurrency import Listener
from ratoon.client.sync.connection import Connection
from ratoon.errors import Unreachable


def evaluate(
    connection: Connection,
    path: str,
    code: str,
    *,
    timeout: float | None,
    on_stdout: Listener[str] | None,
    on_stderr: Listener[str] | None,
) -> EvalResult:
    """See `Sandbox.eval`."""
    ended: dict[str, Any] = {}
    with connection.converse(f"{path}/eval/stream") as talk:

        def outputs() -> Iterator[Output]:
            while isinstance(message := talk.receive(), bytes):
                yield output_of(message)
            if message is None or "exit" not in message:
                raise Unreachable("the daemon closed before it had told how the code ended")
            ended.update(message["exit"])

        talk.send_json(code=code, timeout=timeout)
        gathering = gather(outputs(), on_stdout, on_stderr)
    return gathering.evaluated(ended)
