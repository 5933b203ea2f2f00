"""Lives at random, each reset of which must go back to the last published state, and nowhere else.

What a sandbox stands on changes with each standby, doze and fork, and with whoever takes it over;
what a reset goes back to changes with branches alone.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from vm_helpers import leaves_nothing, no_space, sh, until

from ratoon.engine.sandbox import condense, layer
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import HostError

#: What is done in one series, before its last reset.
ACTIONS = 8
WRITE = "for d in /dev/shm /root; do echo {0} >$d/marker; done; sync"
READ = "cat /dev/shm/marker /root/marker"


class Series:
    """One sandbox after the other, and what its guest must have: `now`, and after a reset."""

    def __init__(self, home: Path, seed: int, done: Counter[str]) -> None:
        self._home = home
        self._rng = random.Random(seed)
        self._name = f"reset{seed}-"
        self._done = done
        self._number = 0
        self._history: list[str] = []
        #: Made by this series, and not deleted.
        self._tags: list[str] = []
        self._now = self._origin = 0
        self._opened = AsyncExitStack()

    async def run(self) -> None:
        try:
            await self._open()
            async with await self._engine.fork_one("base") as maker:
                self._sandbox = maker
                await self._write()
                await self._branch()
            options = SandboxOptions(spare=self._rng.random() < 0.3)
            self._sandbox = await self._engine.fork_one(self._tags[-1], options)
            try:
                for _ in range(ACTIONS):
                    await self._act()
                await self._reset()
            finally:
                await self._sandbox.kill()
                await self._engine.settle()
                for tag in self._tags:
                    await self._engine.delete(tag, force=True)
        finally:
            await self._opened.aclose()

    async def _act(self) -> None:
        action: Callable[[], Awaitable[None]] = self._rng.choice(
            (
                *(self._branch, self._full, self._live, self._failed_branch, self._delete),
                *(self._standby, self._doze, self._fork, self._move_to_fork, self._restart),
                *(self._restart_in_standby, self._reset, self._reset),
            )
        )
        if self._rng.random() < 0.8:
            await self._write()
        await action()
        await self._check(action.__name__)

    async def _check(self, what: str) -> None:
        self._done[what.strip("_")] += 1
        self._history.append(f"{what.strip('_')}: {self._now}, {self._origin}")
        assert await content(self._sandbox) == [str(self._now)] * 2, self._told()

    async def _write(self) -> None:
        self._number += 1
        await sh(self._sandbox, WRITE.format(self._number))
        self._now = self._number

    async def _reset(self) -> None:
        await self._engine.reset(self._sandbox)
        self._now = self._origin
        await self._check("reset")

    async def _branch(self) -> None:
        await self._engine.branch(self._sandbox, self._tag())
        self._origin = self._now

    async def _full(self) -> None:
        await self._engine.branch(self._sandbox, self._tag(), "full")
        self._origin = self._now

    async def _live(self) -> None:
        await (await self._engine.begin_branch(self._sandbox, self._tag())).done
        self._origin = self._now

    async def _failed_branch(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer, "file_digest", no_space)
            with pytest.raises(HostError):
                await self._engine.branch(self._sandbox, "never")

    async def _delete(self) -> None:
        if self._tags:
            await self._engine.delete(self._tags.pop(), force=True)

    async def _standby(self) -> None:
        await self._engine.standby(self._sandbox)
        if self._rng.random() < 0.3:
            await self._fork()
        await self._engine.resume(self._sandbox)

    async def _doze(self) -> None:
        sandbox, options = self._sandbox, self._sandbox.options
        sandbox.options = options.model_copy(update={"idle_seconds": 0.01, "idle_counts": "calls"})
        await until(lambda: sandbox.state == "standby", "its standby")
        sandbox.options = options

    async def _fork(self) -> None:
        """What a fork goes back to is what it was forked as, whatever its source goes back to."""
        (fork,) = await self._engine.fork_sandbox(self._sandbox)
        assert isinstance(fork, Sandbox)
        async with fork:
            await sh(fork, WRITE.format("lost"))
            await self._engine.standby(fork)
            await self._engine.resume(fork)
            await self._engine.reset(fork)
            assert await content(fork) == [str(self._now)] * 2, self._told()

    async def _move_to_fork(self) -> None:
        """Go on with a fork: it was forked from what the sandbox is now."""
        (fork,) = await self._engine.fork_sandbox(self._sandbox)
        assert isinstance(fork, Sandbox)
        await self._sandbox.kill()
        self._sandbox, self._origin = fork, self._now

    async def _restart(self) -> None:
        await self._opened.aclose()
        await self._open()
        (self._sandbox,) = self._engine.sandboxes

    async def _restart_in_standby(self) -> None:
        await self._engine.standby(self._sandbox)
        await self._restart()
        await self._engine.resume(self._sandbox)

    async def _open(self) -> None:
        self._engine = await self._opened.enter_async_context(Engine.open(self._home, keep=True))

    def _told(self) -> str:
        return f"{self._name}: {self._history}; has {self._now}, goes back to {self._origin}"

    def _tag(self) -> str:
        self._number += 1
        self._tags.append(f"{self._name}{self._number}")
        return self._tags[-1]


async def content(sandbox: Sandbox) -> list[str]:
    """The markers in its memory and on its disk, read anew."""
    return (await sh(sandbox, f"echo 3 >/proc/sys/vm/drop_caches; {READ}")).split()


async def test_random_resets(engine: Engine, soak: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condense, "LIMIT", 2)
    first = random.randrange(1 << 32) if soak else 20
    series = int(os.environ.get("RATOON_SOAK_SERIES", "300")) if soak else 4
    done: Counter[str] = Counter()
    for seed in range(first, first + series):
        with leaves_nothing(engine):
            await Series(engine.store.home, seed, done).run()
        if soak:
            print(f"seed {seed}; so far {dict(sorted(done.items()))}", flush=True)
