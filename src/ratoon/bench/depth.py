"""What a chain's depth costs: forks of heads at several depths, by the engine and over HTTP.

::

    python -m ratoon.bench.depth [--rounds N] [--csv FILE]

The chain is one sandbox, branched again and again, each time with a file more on its disk. The
depths take turns, so that noise hits all alike; every head has its images before the first round.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from ratoon.bench.machine import describe_machine
from ratoon.bench.samples import percentile, write_rows
from ratoon.bench.served import Api, served
from ratoon.sandbox.engine import Engine

ROUNDS = 40
DEPTHS = (0, 1, 3, 8, 16, 32)
STAGES = ("resolve", "verify", "image", "overlay", "start", "load", "resume", "rebirth")


@dataclass(frozen=True)
class Fork:
    """One fork of the head at `depth`, in ms: as its caller saw it, and by stages; and its end."""

    how: str
    depth: int
    round: int
    seen_ms: float
    fork_ms: float
    kill_ms: float
    resolve: float
    verify: float
    image: float
    overlay: float
    start: float
    load: float
    resume: float
    rebirth: float


def tag_of(depth: int) -> str:
    return f"d{depth}"


async def grow(engine: Engine, depths: Sequence[int]) -> None:
    """Make the base d0 and a snapshot d<depth> for each of `depths`; the links between are deleted.

    What stands on a deleted link has its layer all the same.
    """
    if tag_of(0) not in _tags(engine):
        await engine.from_image("debian", tag_of(0))
    async with await engine.fork_one(tag_of(0)) as sandbox:
        for depth in range(1, max(depths) + 1):
            script = f"head -c 20000 /dev/urandom >/root/{depth}; sync"
            await sandbox.exec(["sh", "-c", script], timeout=60)
            await engine.branch(sandbox, tag_of(depth))
    for depth in range(1, max(depths)):
        if depth not in depths:
            await engine.delete(tag_of(depth), force=True)


def _tags(engine: Engine) -> set[str]:
    return {path.name for path in engine.store.snapshots.iterdir()}


async def warm(engine: Engine, depths: Sequence[int]) -> None:
    """The second fork of a head has its images made."""
    for _ in range(2):
        for depth in depths:
            await (await engine.fork_one(tag_of(depth))).kill()
    await engine.settle()


async def fork_once(engine: Engine, depth: int, number: int) -> Fork:
    began = time.perf_counter()
    sandbox = await engine.fork_one(tag_of(depth))
    seen = (time.perf_counter() - began) * 1e3
    began = time.perf_counter()
    await sandbox.kill()
    killed = (time.perf_counter() - began) * 1e3
    stages = {stage: sandbox.stages.get(stage, 0.0) for stage in STAGES}
    return Fork("engine", depth, number, seen, sandbox.fork_ms, killed, **stages)


async def spawn_once(engine: Engine, api: Api, depth: int, number: int) -> Fork:
    answered = await api.fork(tag_of(depth))
    sandbox = engine.get(answered.body["id"])
    began = time.perf_counter()
    await api.kill(sandbox.id)
    killed = (time.perf_counter() - began) * 1e3
    stages = {stage: sandbox.stages.get(stage, 0.0) for stage in STAGES}
    return Fork("HTTP", depth, number, answered.ms, sandbox.fork_ms, killed, **stages)


async def measure(engine: Engine, api: Api, depths: Sequence[int], rounds: int) -> list[Fork]:
    """Fork each depth in turn, both ways, and kill each sandbox before the next."""
    samples = []
    for number in range(-2, rounds):  # the first are for warming up
        for depth in depths if number % 2 else reversed(depths):
            samples.append(await fork_once(engine, depth, number))
            samples.append(await spawn_once(engine, api, depth, number))
    return [sample for sample in samples if sample.round >= 0]


async def run(home: Path, depths: Sequence[int], rounds: int) -> list[Fork]:
    async with Engine.open(home) as engine:
        await grow(engine, depths)
        await warm(engine, depths)
        async with served(engine) as api:
            return await measure(engine, api, depths, rounds)


def show(console: Console, samples: list[Fork]) -> None:
    """Print the medians at each depth, and how the forks' compare with those of the first."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "depth", "n", "fork p50 ms", "p95", "ratio", "kill", *STAGES):
        table.add_column(name, justify="right" if name else "left")
    for how in ("engine", "HTTP"):
        shallowest = None
        for depth in sorted({sample.depth for sample in samples}):
            of_depth = [s for s in samples if (s.how, s.depth) == (how, depth)]
            seen = [sample.seen_ms for sample in of_depth]
            shallowest = shallowest or median(seen)
            table.add_row(
                *(how, str(depth), str(len(seen))),
                *(f"{median(seen):.1f}", f"{percentile(seen, 95):.1f}"),
                f"{median(seen) / shallowest:.3f}",
                f"{median(sample.kill_ms for sample in of_depth):.1f}",
                *(f"{median(getattr(s, stage) for s in of_depth):.1f}" for stage in STAGES),
            )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ratoon.bench.depth")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--csv", type=Path, help="also write the samples as CSV to this file")
    options = parser.parse_args()
    console = Console(width=160)
    console.print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="ratoon-depth-") as name:
        samples = asyncio.run(run(Path(name), options.depths, options.rounds))
    show(console, samples)
    if options.csv:
        write_rows(options.csv, samples)


if __name__ == "__main__":
    main()
