"""Lives of sandboxes at random, their machines killed at random moments.

What was acknowledged is never lost: a snapshot forks with the content it was taken with, a sandbox
goes on from standby with what it had, and back to its last branch. What it wrote to a volume is
there at its end, and no fork has run under its source's name. And nothing is left over.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import group_loops
import pytest
from vm_helpers import control_groups_of, leaves_nothing, open_files, processes_of, sh, tags
from volume_writer import Writer, volumes

from ratoon import paths
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict, GuestError, MachineError, NotFound, RatoonError
from ratoon.machine.host.limits import Limits

WORKERS = 3
#: What is done in one life, at most.
ACTIONS = 3
#: Snapshots that are kept to be forked later.
KEPT = 5
#: A machine is killed within so many seconds of an action's begin.
KILL_WITHIN = 0.4
#: What an action may end with when its machine is killed.
DEATHS = (MachineError, GuestError, Conflict)
#: In memory and on the disk: a token, and random bytes with their checksum beside it.
EMPTY = "none none"
WRITE = """
for d in /dev/shm /root; do echo {0} >$d/token; head -c 100000 /dev/urandom >$d/bytes
cd $d; sha256sum bytes >sum; done; sync
"""
READ = """
dmesg | grep -iE 'ext4.*(error|warning)|I/O error'; cd /root
if [ -e sum ]; then dd if=bytes iflag=nocache count=0 2>/dev/null; sync
sha256sum --quiet -c sum; (cd /dev/shm; sha256sum --quiet -c sum); fi
for d in /dev/shm /root; do cat $d/token 2>/dev/null || echo none; done
"""


@dataclass
class Life:
    """A sandbox; what it has, and what it has after a reset.

    `writer` writes to its volume all the time; `moves`: a loop in it goes from one control group to
    another. `writes_below`, `moves_below`: whether they do after a reset.
    """

    sandbox: Sandbox
    now: str
    below: str
    writer: Writer | None = None
    moves: bool = False
    moves_below: bool = False
    writes_below: bool = False


class Lives:
    """`known`: what forks of each acknowledged snapshot must find."""

    def __init__(self, engine: Engine, rng: random.Random, shared: Path) -> None:
        """`shared`: where directories for volumes are made."""
        self._engine = engine
        self._rng = rng
        self._shared = shared
        self._tokens = 0
        self.known = {"base": EMPTY}
        self.done: Counter[str] = Counter()

    async def cycle(self) -> None:
        """Fork a snapshot, do things with the sandbox and verify them, kill it."""
        tag = self._rng.choice(sorted(self.known))
        before = self.known[tag]
        shared = self._shared / f"volume{self._token()}" if self._rng.random() < 0.3 else None
        if shared:
            shared.mkdir()
        try:
            sandbox = await self._engine.fork_one(tag, self._options(shared))
        except NotFound:  # another worker has deleted it
            assert tag not in self.known
            return
        written = 0
        async with sandbox:
            life = Life(sandbox, before, before)
            await self._verify(life)
            if tag == "base" and self._rng.random() < 0.3:
                await group_loops.start(sandbox, "mover")
                life.moves = True
            if shared:
                await sh(sandbox, "rm -f /dev/shm/count")  # of a writer that its source had
                life.writer = await Writer.begin(sandbox, shared)
            for _ in range(self._rng.randint(1, ACTIONS)):
                if not await self._act(life):
                    life.writer = None
                    break
            if life.writer:
                written = await life.writer.written()
        if life.writer:
            assert sandbox.unsynced or life.writer.lost(written) == (0, 0)
            self.done["written to the end"] += 1
        await self._tidy()

    def _options(self, shared: Path | None) -> SandboxOptions:
        limits = Limits(memory_bytes=1 << 30, pids=500) if self._rng.random() < 0.2 else Limits()
        options = volumes(shared) if shared else SandboxOptions()
        return options.model_copy(update={"spare": self._rng.random() < 0.3, "limits": limits})

    async def _act(self, life: Life) -> bool:
        """Write, and do one thing; False if that has killed the machine, as it was to."""
        token = self._token()
        await sh(life.sandbox, WRITE.format(token))
        life.now = f"{token} {token}"
        action = self._rng.choice(
            (
                *(self._branch, self._live, self._full, self._reset),
                *(self._standby, self._dozing, self._forks, self._forks_in_standby),
            )
        )
        doomed = self._rng.random() < 0.2
        name = action.__name__.strip("_") + (" killed" if doomed else "")
        try:
            await self._killing(life.sandbox, doomed, action(life))
            await self._verify(life)
        except DEATHS:
            assert doomed
            name += " died"
            return False
        finally:
            self.done[name] += 1
        return True

    async def _killing(self, sandbox: Sandbox, doomed: bool, action: Awaitable[None]) -> None:
        """Do it, with one of the sandbox's machines killed at a random moment meanwhile."""
        if not doomed:
            await action
            return

        async def kill() -> None:
            await asyncio.sleep(self._rng.random() * KILL_WITHIN)
            if found := processes_of(sandbox.directory.path):
                with suppress(ProcessLookupError):
                    os.kill(self._rng.choice(found), signal.SIGKILL)

        killing = asyncio.create_task(kill())
        try:
            await action
        finally:
            await killing

    async def _verify(self, life: Life) -> None:
        assert await content(life.sandbox) == life.now

    async def _branch(self, life: Life) -> None:
        await self._published(life, lambda tag: self._engine.branch(life.sandbox, tag))

    async def _full(self, life: Life) -> None:
        await self._published(life, lambda tag: self._engine.branch(life.sandbox, tag, mode="full"))

    async def _live(self, life: Life) -> None:
        async def live(tag: str) -> object:
            return await (await self._engine.begin_branch(life.sandbox, tag)).done

        await self._published(life, live)

    async def _published(self, life: Life, publish: Callable[[str], Awaitable[object]]) -> None:
        tag = f"life{self._token()}"
        acknowledged = False
        try:
            await publish(tag)
            acknowledged = True
        finally:
            # One that failed may be there all the same, and then it is whole.
            assert not acknowledged or tag in tags(self._engine)
            if tag in tags(self._engine):
                self.known[tag] = life.below = life.now
                life.moves_below = life.moves
                life.writes_below = life.writer is not None
                async with await self._engine.fork_one(tag) as fork:
                    assert await content(fork) == life.now
                    if life.moves:
                        await self._verify_groups(life, tag, fork)
            else:
                with suppress(NotFound):
                    await self._engine.delete(tag)

    async def _verify_groups(self, life: Life, tag: str, fork: Sandbox) -> None:
        """In each fork of a snapshot the loop has run as often under the source's name."""
        async with await self._engine.fork_one(tag) as other:
            found = []
            for each in (fork, other):
                await group_loops.until_counting(each, "mover")
                found.append((await group_loops.counts(each, "mover")).get(life.sandbox.id))
        assert found[0] == found[1]
        self.done["moved"] += 1

    async def _standby(self, life: Life) -> None:
        await self._engine.standby(life.sandbox)
        assert life.sandbox.state == "standby"
        assert processes_of(life.sandbox.directory.path) == []
        try:
            await self._engine.resume(life.sandbox)
        except MachineError:  # the new machine was killed: nothing is lost by that
            assert life.sandbox.state == "standby"
            await self._engine.resume(life.sandbox)

    async def _dozing(self, life: Life) -> None:
        """Nobody uses it, until it has gone to standby, or is on the way."""
        life.sandbox.options = life.sandbox.options.model_copy(update={"idle_seconds": 0.01})
        await asyncio.sleep(self._rng.random() * 2)
        life.sandbox.options = life.sandbox.options.model_copy(update={"idle_seconds": None})
        await self._verify(life)
        await self._branch(life)

    async def _forks(self, life: Life) -> None:
        await self._forked(life, 2)

    async def _forks_in_standby(self, life: Life) -> None:
        await self._engine.standby(life.sandbox)
        await self._forked(life, self._rng.choice((1, 2)))
        await self._engine.resume(life.sandbox)

    async def _forked(self, life: Life, n: int) -> None:
        options = life.sandbox.options.model_copy(update={"volumes": ()})  # it has them alone
        outcomes = await self._engine.fork_sandbox(life.sandbox, n, options)
        forks = [outcome for outcome in outcomes if isinstance(outcome, Sandbox)]
        try:
            assert len(forks) == n, outcomes
            for fork in forks:
                assert await content(fork) == life.now
        finally:
            await asyncio.gather(*(fork.kill() for fork in forks))

    async def _reset(self, life: Life) -> None:
        written = await life.writer.written() if life.writer else 0
        await self._engine.reset(life.sandbox)
        life.now, life.moves = life.below, life.moves_below
        if life.writer:
            writer, life.writer = life.writer, None
            # Its machine may have been killed before that was written; then it is told. One that is
            # in what the sandbox is now writes what it wrote then over what it has written since.
            if not life.writes_below and not life.sandbox.unsynced:
                assert writer.lost(written) == (0, 0)

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


def held(engine: Engine) -> list[object]:
    """What the engine holds of the host besides machines and directories."""
    runtime = paths.runtime(engine.store.home)
    sockets = sorted(path for path in runtime.rglob("*"))
    images = {path.stem for path in engine.images.directory.glob("*.ram")}
    return [sorted(open_files()), sockets, control_groups_of(runtime.name), images]


async def test_random_lives(engine: Engine, soak: bool, tmp_path: Path) -> None:
    seed = random.randrange(1 << 32) if soak else 7
    cycles = int(os.environ.get("RATOON_SOAK_CYCLES", "1000")) if soak else 8
    lives = Lives(engine, random.Random(seed), tmp_path)
    async with await engine.fork_one("base") as first:  # what is made once for all
        await sh(first, "true")
    before = held(engine)
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
            where = "".join(map("".join, map(traceback.format_exception, errors.exceptions)))
            pytest.fail(f"seed {seed}: {where}")
        await engine.settle()
        for tag in tags(engine) - {"base"}:
            await engine.delete(tag, force=True)
    assert held(engine) == before
