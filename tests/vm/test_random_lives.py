"""Lives of sandboxes at random, their machines killed at random moments.

What was acknowledged is never lost: a snapshot forks with the content it was taken with, a sandbox
in standby resumes with what it had. And nothing is left over.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from vm_helpers import forget, leaves_nothing, open_files, processes_of, sh, tags

from ratoon.errors import Conflict, GuestError, MachineError, NotFound, RatoonError
from ratoon.sandbox.engine import Engine
from ratoon.sandbox.sandbox import Sandbox

WORKERS = 3
#: Snapshots that are kept to be forked later.
KEPT = 5
#: A machine is killed within so many seconds of an action's begin.
KILL_WITHIN = 0.4
#: What an action may end with when its machine is killed.
DEATHS = (MachineError, GuestError, Conflict)
EMPTY = "none none"
READ = "for d in /dev/shm /root; do cat $d/token 2>/dev/null || echo none; done"


class Lives:
    """`known`: what forks of each acknowledged snapshot must find."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self._engine = engine
        self._rng = rng
        self._tokens = 0
        self.known = {"base": EMPTY}
        self.done: Counter[str] = Counter()

    async def cycle(self) -> None:
        """Fork a snapshot, write, do something with the sandbox, verify, kill."""
        tag = self._rng.choice(sorted(self.known))
        before = self.known[tag]
        try:
            sandbox = await self._engine.fork_one(tag)
        except NotFound:  # another worker has deleted it
            assert tag not in self.known
            return
        async with sandbox:
            assert await content(sandbox) == before
            token = self._token()
            await sh(sandbox, f"for d in /dev/shm /root; do echo {token} >$d/token; done")
            action = self._rng.choice(
                (self._branch, self._live, self._full, self._standby, self._forks, self._reset)
            )
            doomed = self._rng.random() < 0.3
            name = action.__name__ + (" killed" if doomed else "")
            try:
                await self._killing(sandbox, doomed, action(sandbox, before, f"{token} {token}"))
            except DEATHS:
                assert doomed
                name += " died"
            self.done[name] += 1
        await self._tidy()

    async def _killing(self, sandbox: Sandbox, doomed: bool, action: Awaitable[None]) -> None:
        """Do it, with the sandbox's machine killed at a random moment meanwhile."""
        if not doomed:
            await action
            return
        pid, delay = sandbox.pid, self._rng.random() * KILL_WITHIN

        async def kill() -> None:
            await asyncio.sleep(delay)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

        killing = asyncio.create_task(kill())
        try:
            await action
        finally:
            await killing

    async def _branch(self, sandbox: Sandbox, before: str, now: str) -> None:
        await self._published(sandbox, now, lambda tag: self._engine.branch(sandbox, tag))

    async def _full(self, sandbox: Sandbox, before: str, now: str) -> None:
        await self._published(
            sandbox, now, lambda tag: self._engine.branch(sandbox, tag, mode="full")
        )

    async def _live(self, sandbox: Sandbox, before: str, now: str) -> None:
        async def live(tag: str) -> object:
            return await (await self._engine.begin_branch(sandbox, tag)).done

        await self._published(sandbox, now, live)

    async def _published(
        self, sandbox: Sandbox, now: str, publish: Callable[[str], Awaitable[object]]
    ) -> None:
        tag = f"life{self._token()}"
        try:
            await publish(tag)
        finally:  # one that failed may be there all the same, and then it is whole
            if tag in tags(self._engine):
                self.known[tag] = now
                await self._verify(tag)
            else:
                with suppress(NotFound):
                    await self._engine.delete(tag)
        assert tag in self.known
        assert await content(sandbox) == now

    async def _standby(self, sandbox: Sandbox, before: str, now: str) -> None:
        await self._engine.standby(sandbox)
        assert sandbox.state == "standby"
        await self._engine.resume(sandbox)
        assert await content(sandbox) == now
        await self._branch(sandbox, before, now)

    async def _forks(self, sandbox: Sandbox, before: str, now: str) -> None:
        outcomes = await self._engine.fork_sandbox(sandbox, 2)
        forks = [outcome for outcome in outcomes if isinstance(outcome, Sandbox)]
        try:
            assert len(forks) == 2, outcomes
            for fork in forks:
                assert await content(fork) == now
        finally:
            await asyncio.gather(*(fork.kill() for fork in forks))
        assert await content(sandbox) == now

    async def _reset(self, sandbox: Sandbox, before: str, now: str) -> None:
        await self._engine.reset(sandbox)
        assert await content(sandbox) == before

    async def _verify(self, tag: str) -> None:
        async with await self._engine.fork_one(tag) as fork:
            assert await content(fork) == self.known[tag]

    async def _tidy(self) -> None:
        while len(self.known) > KEPT:
            oldest = next(tag for tag in self.known if tag != "base")
            del self.known[oldest]
            await self._engine.delete(oldest, force=True)

    def _token(self) -> int:
        self._tokens += 1
        return self._tokens


async def content(sandbox: Sandbox) -> str:
    return " ".join((await sh(sandbox, READ)).split())


async def test_random_lives(engine: Engine, soak: bool) -> None:
    seed = random.randrange(1 << 32) if soak else 7
    cycles = 1000 if soak else 10
    lives = Lives(engine, random.Random(seed))
    files = Counter(open_files())
    left = cycles

    async def work() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await lives.cycle()
            if soak and left % 50 == 0:
                print(f"{left} cycles left; so far {dict(sorted(lives.done.items()))}", flush=True)

    with leaves_nothing(engine):
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(WORKERS):
                    workers.create_task(work())
        except* (AssertionError, RatoonError) as errors:
            pytest.fail(f"seed {seed}: {errors.exceptions}")
        for tag in tags(engine) - {"base"}:
            forget(engine, tag)
    assert processes_of(engine.store.sandboxes) == []
    await engine.settle()
    assert sorted((Counter(open_files()) - files).elements()) == []
