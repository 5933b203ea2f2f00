"""Pruning: a plan of what to keep is made, and what is not kept is deleted, as anybody would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import InFlight, NotFound, RatoonError
from ratoon.store.snapshot.inventory import sandboxes_by_snapshot, take_inventory
from ratoon.store.snapshot.retention import Plan, Rules, Verdict, make_plan


@dataclass(frozen=True)
class Pruned:
    """What was planned; the tags that were deleted, and of the others that should be, why not."""

    plan: Plan
    deleted: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


async def prune(
    engine: Engine, rules: Rules, users: Mapping[str, str], *, dry_run: bool = False
) -> Pruned:
    """Delete what the rules do not keep; `users` says by tag who else needs it.

    InvalidInput, NotFound: see `make_plan`. What changed meanwhile stays: what was made anew, has
    got dependents, or is used by now. A snapshot that cannot be deleted holds up no other.
    """
    inventory = await asyncio.to_thread(take_inventory, engine.store, users)
    plan = make_plan(inventory, rules, time.time())
    if dry_run:
        return Pruned(plan)
    deleted: list[str] = []
    failed: dict[str, str] = {}
    for verdict in plan.deletions:
        try:
            await _delete(engine, verdict)
        except NotFound:  # somebody else was quicker
            continue
        except (RatoonError, OSError) as error:
            failed[verdict.tag] = str(error)
        else:
            deleted.append(verdict.tag)
    return Pruned(plan, tuple(deleted), failed)


async def _delete(engine: Engine, verdict: Verdict) -> None:
    """Delete what was planned, if it still is what it was."""
    if engine.store.get(verdict.tag).manifest.id != verdict.id:
        raise NotFound(f"snapshot {verdict.tag} is another by now")
    users = await asyncio.to_thread(sandboxes_by_snapshot, engine.store)
    if used := users.get(verdict.id):
        raise InFlight(f"snapshot {verdict.tag} is used by {', '.join(used)} by now")
    await engine.delete(verdict.tag)
