"""The route of events: what happens, line by line, for as long as somebody listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import asdict

from fastapi import APIRouter, Response

from ratoon.daemon.context import TheDaemon
from ratoon.daemon.problems import error_responses
from ratoon.daemon.responses import Pieces
from ratoon.engine.sandbox.events import Listener

router = APIRouter(tags=["events"])

LINES = "application/x-ndjson"
#: Seconds without an event until an empty line shows that both sides are still there.
QUIET = 15.0


@router.get(
    "/v1/events",
    response_class=Response,
    responses={
        **error_responses(),
        200: {
            "content": {LINES: {"schema": {"type": "string"}}},
            "description": "Lines of EventInfo.",
        },
    },
)
async def follow(daemon: TheDaemon) -> Response:
    """What happens from now on: a JSON object in each line, and an empty line now and then.

    First comes how far each snapshot, or run, is that is being made, if something was told of it.
    Who does not read loses events, and gets one of kind `overflow` in their place.
    """
    held = AsyncExitStack()
    listener = held.enter_context(daemon.engine.events.listen())
    return Pieces(_lines(listener), held, media_type=LINES)


async def _lines(listener: Listener) -> AsyncIterator[bytes]:
    yield b"\n"
    while True:
        try:
            async with asyncio.timeout(QUIET):
                event = await listener.next()
        except TimeoutError:
            yield b"\n"
            continue
        if event is None:
            return
        yield json.dumps(asdict(event)).encode() + b"\n"
