"""Python in a sandbox's warm interpreter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ratoon.api.answers import EvalResult
from ratoon.client.aio.commands import gather
from ratoon.client.aio.concurrency import Listener
from ratoon.client.aio.connection import AsyncConnection
from ratoon.client.output import Output, output_of
from ratoon.errors import Unreachable


async def evaluate(
    connection: AsyncConnection,
    path: str,
    code: str,
    *,
    timeout: float | None,
    on_stdout: Listener[str] | None,
    on_stderr: Listener[str] | None,
) -> EvalResult:
    """See `AsyncSandbox.eval`."""
    ended: dict[str, Any] = {}
    async with connection.converse(f"{path}/eval/stream") as talk:

        async def outputs() -> AsyncIterator[Output]:
            while isinstance(message := await talk.receive(), bytes):
                yield output_of(message)
            if message is None or "exit" not in message:
                raise Unreachable("the daemon closed before it had told how the code ended")
            ended.update(message["exit"])

        await talk.send_json(code=code, timeout=timeout)
        gathering = await gather(outputs(), on_stdout, on_stderr)
    return gathering.evaluated(ended)
