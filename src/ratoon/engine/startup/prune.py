"""Removing starts: what is of no use any more, what was not used for long, or all."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.startup.cache import Damaged, Entry, StartCache, Tier, tag_of
from ratoon.engine.startup.key import unfit
from ratoon.errors import InFlight, NotFound


@dataclass(frozen=True)
class Doomed:
    """A start that goes, or its snapshot that nothing points at, and why.

    `tiers`: what it may be; `tag` is its snapshot's, which may be gone.
    """

    key: str
    tag: str
    tiers: tuple[Tier, ...]
    why: str


async def prune(
    engine: Engine,
    cache: StartCache,
    *,
    older_than: float | None = None,
    everything: bool = False,
    dry_run: bool = False,
) -> list[Doomed]:
    """Remove starts and their snapshots, as `doomed` chooses them; those that went, or would.

    What somebody makes or forks at this moment stays. Sandboxes are not affected, nor is what was
    made from a start.
    """
    gone = []
    for each in doomed(cache, older_than=older_than, everything=everything):
        if dry_run or await _remove(engine, cache, each):
            gone.append(each)
    return gone


def doomed(
    cache: StartCache, *, older_than: float | None = None, everything: bool = False
) -> list[Doomed]:
    """What no run can use; also what was not used for `older_than` seconds, or all there is."""
    found = []
    for each in cache.everything():
        if why := _why(cache, each, older_than, everything=everything):
            tiers: tuple[Tier, ...] = (each.document.tier,) if isinstance(each, Entry) else (1, 2)
            found.append(Doomed(each.key, tag_of(each.key), tiers, why))
    for tag in cache.orphans():
        found.append(Doomed(tag.removeprefix("start-"), tag, (1, 2), "no document points at it"))
    return found


def _why(
    cache: StartCache, each: Entry | Damaged, older_than: float | None, *, everything: bool
) -> str | None:
    if isinstance(each, Damaged):
        return each.reason
    if gone := cache.gone(each):
        return gone
    if strange := unfit(each.document):
        return f"this host cannot load it: {strange[0]}"
    idle = time.time() - cache.used_at(each.key)
    if older_than is not None and idle >= older_than:
        return f"it was not used for {timedelta(seconds=round(idle))}"
    return "all are to go" if everything else None


async def _remove(engine: Engine, cache: StartCache, each: Doomed) -> bool:
    """Whether it went; it does not while somebody makes it."""
    with ExitStack() as held:
        for tier in sorted(each.tiers, reverse=True):
            lock = cache.try_making(tier, each.key)
            if lock is None:
                return False
            held.callback(os.close, lock)
        cache.remove(each.key)
        with suppress(NotFound, InFlight):
            await engine.delete(each.tag, force=True)
    return True
