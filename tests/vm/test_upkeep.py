"""Compressing and pruning below machines that run: they go on, and so do forks of what is left."""

from __future__ import annotations

import asyncio
from functools import partial

from vm_helpers import sh, tags

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.prune import prune
from ratoon.store.memory.compressed import is_compressed
from ratoon.store.snapshot.compress import Form, rewrite_layers
from ratoon.store.snapshot.retention import Rules
from ratoon.store.snapshot.usage import usage
from ratoon.units import MIB

LEAVE = "head -c 4000000 /dev/urandom | base64 >/dev/shm/left; sha256sum </dev/shm/left"
LOOK = "sha256sum </dev/shm/left"


async def rewrite(engine: Engine, form: Form) -> int:
    """Give all layers that form; how many bytes less they take."""
    done = await asyncio.to_thread(partial(rewrite_layers, engine.store, form))
    assert {each.outcome for each in done} == {form}
    return sum(each.bytes_before - each.bytes_after for each in done)


async def test_compressing_and_pruning_below_a_sandbox(engine: Engine) -> None:
    async with await engine.fork_one("base") as sandbox:
        left = await sh(sandbox, LEAVE)
        await engine.branch(sandbox, "left")
        await engine.settle()
        before = usage(engine.store).total
        try:
            saved = await rewrite(engine, "compressed")
            twin = sandbox.directory.path / "parent"
            assert is_compressed(twin / "memory.bin", label="L")
            assert is_compressed(twin / "ancestry" / "0" / "memory.bin", label="L")
            assert saved > 32 * MIB
            assert usage(engine.store).total < before - saved * 0.9, "the sandbox writes a little"

            engine.evict_image("left")
            async with await engine.fork_one("left") as fork:  # patched
                assert await sh(fork, LOOK) == left
            engine.evict_image("base")
            async with await engine.fork_one("left") as fork:  # an image
                assert await sh(fork, LOOK) == left
            await engine.reset(sandbox)
            assert await sh(sandbox, LOOK) == left
            await engine.standby(sandbox)

            rules = Rules(keep_within=0, keep=("base",))
            pruned = await prune(engine, rules, {})
            assert pruned.deleted == ()
            reasons = {each.tag: each.reason for each in pruned.plan.verdicts}
            assert reasons["left"] == f"used by sandbox {sandbox.id}"
            await engine.resume(sandbox)
            assert await sh(sandbox, LOOK) == left
        finally:
            await rewrite(engine, "plain")
    await engine.settle()
    before = usage(engine.store).total
    pruned = await prune(engine, rules, {})
    assert pruned.deleted == ("left",)
    assert before - usage(engine.store).total == pruned.plan.freed > 0
    assert tags(engine) == {"base"}
