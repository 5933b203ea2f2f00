"""What is done to sandboxes when their time has come: the end, or standby."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import NoReturn

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import RatoonError

log = logging.getLogger(__name__)

#: Seconds between looks at the sandboxes.
INTERVAL = 0.5

Action = Callable[[Sandbox], Awaitable[object]]


async def keep_time(
    sandboxes: Callable[[], Iterable[Sandbox]], *, kill: Action, suspend: Action
) -> NoReturn:
    """Kill the sandboxes that are over, and suspend those that are not in use.

    Over is one that has lived for its time, or whose command has ended, if its options say so.

    Deaths are told, once.
    """
    mourned: set[str] = set()
    while True:
        await asyncio.sleep(INTERVAL)
        dead = {each.id: each for each in sandboxes() if each.state == "dead"}
        for lost in dead.keys() - mourned:
            dead[lost].events.tell("died", sandbox=lost)
        mourned = set(dead)
        await asyncio.gather(*(each.look() for each in sandboxes()))
        due = [(sandbox, action) for sandbox in sandboxes() if (action := _due(sandbox))]
        await asyncio.gather(
            *(_act(sandbox, kill if action == "kill" else suspend) for sandbox, action in due)
        )


def _due(sandbox: Sandbox) -> str | None:
    options = sandbox.options
    if options.ttl_seconds and time.time() - sandbox.record.created_at_unix >= options.ttl_seconds:
        return "kill"
    if options.auto_remove and sandbox.has_ended and not sandbox.stopping:
        return "kill"
    return "suspend" if sandbox.is_idle else None


async def _act(sandbox: Sandbox, action: Action) -> None:
    try:
        await action(sandbox)
    except (RatoonError, OSError) as error:  # the next look may find it better
        log.warning("sandbox %s: %s", sandbox.id, error)
