"""Many forks at once: how long, how much memory, and how much is read from the disk.

::

    python -m ratoon.bench.fanout [--rounds N] [--csv FILE]

Beside them, in the same run, cold boots at the same concurrency. Then a burst whose files are not
in the page cache, against a single fork that begins the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from ratoon.bench.machine import describe_machine
from ratoon.bench.samples import MIB, forget_files, percentile, read_bytes, write_rows
from ratoon.errors import RatoonError
from ratoon.host.usage import usage
from ratoon.sandbox.engine import Engine
from ratoon.sandbox.fork import CONCURRENT_STARTS
from ratoon.sandbox.sandbox import Sandbox

SIZES = (1, 10, 25, 50, 100)
COLD = "forks, nothing cached"
COLD_BURST = 25
#: Cold boots: enough for each place of the concurrency to have several.
BOOTS = 3 * CONCURRENT_STARTS
ROUNDS = 3


@dataclass(frozen=True)
class Burst:
    """One burst, or one set of cold boots. Times in ms; bytes of all its machines together."""

    what: str
    round: int
    n: int
    answered: int
    wall_ms: float
    fork_p50_ms: float
    fork_p95_ms: float
    exec_p50_ms: float
    private_bytes: int
    read_bytes: int


class FanOut:
    """The measurement, in the store of `engine`; `samples` has what was found."""

    def __init__(self, engine: Engine, rounds: int, console: Console) -> None:
        self._engine = engine
        self._rounds = rounds
        self._console = console
        self.samples: list[Burst] = []

    async def run(self) -> None:
        await self._engine.from_image("debian", "base", progress=self._say)
        await (await self._engine.fork_one("base")).kill()
        for number in range(self._rounds):
            self._say(f"round {number + 1} of {self._rounds}")
            for n in SIZES:
                await self._measure("forks", number, n, self._engine.fork("base", n))
            await self._measure("cold boots", number, BOOTS, self._boot())
            for n in (1, COLD_BURST):
                await self._engine.settle()
                await asyncio.to_thread(forget_files, self._engine.store.home)
                await self._measure(
                    "forks, nothing cached", number, n, self._engine.fork("base", n)
                )

    async def _boot(self) -> list[Sandbox | RatoonError]:
        places = asyncio.Semaphore(CONCURRENT_STARTS)

        async def one() -> Sandbox | RatoonError:
            async with places:
                try:
                    return await self._engine.boot("debian")
                except RatoonError as error:
                    return error

        return list(await asyncio.gather(*(one() for _ in range(BOOTS))))

    async def _measure(
        self,
        what: str,
        number: int,
        n: int,
        starting: Coroutine[Any, Any, list[Sandbox | RatoonError]],
    ) -> None:
        """Until each of them has answered a command; then all are killed."""
        before = read_bytes("self")
        began = time.perf_counter()
        outcomes = await starting
        sandboxes = [outcome for outcome in outcomes if isinstance(outcome, Sandbox)]
        execs = await asyncio.gather(*(_first_exec(sandbox) for sandbox in sandboxes))
        wall = time.perf_counter() - began
        forks = [sandbox.fork_ms for sandbox in sandboxes]
        self.samples.append(
            Burst(
                what,
                number,
                n,
                sum(answered for answered, _ in execs),
                round(wall * 1e3, 1),
                round(percentile(forks, 50), 1),
                round(percentile(forks, 95), 1),
                round(median(ms for _, ms in execs), 1),
                sum(map(_private_bytes, sandboxes)),
                read_bytes("self") - before + sum(read_bytes(each.pid) for each in sandboxes),
            )
        )
        await asyncio.gather(*(sandbox.kill() for sandbox in sandboxes))

    def _say(self, message: str) -> None:
        self._console.print(f"[dim]·[/dim] {message}", highlight=False)


async def _first_exec(sandbox: Sandbox) -> tuple[bool, float]:
    began = time.perf_counter()
    result = await sandbox.exec(["hostname"], timeout=120)
    took = (time.perf_counter() - began) * 1e3
    return result.stdout.decode().strip() == sandbox.id, took


def _private_bytes(sandbox: Sandbox) -> int:
    used = usage(sandbox.pid, sandbox.incarnation.overlay)
    return used.memory_bytes if used else 0


def show(console: Console, samples: list[Burst]) -> None:
    """Print the medians of the rounds, and what follows from them."""
    table = Table(box=None, pad_edge=False)
    names = ("", "n", "answered", "wall s", "fork p50 ms", "p95", "first exec ms")
    for name in (*names, "private MiB each", "disk read MiB"):
        table.add_column(name, justify="right" if name else "left")
    kinds = dict.fromkeys((sample.what, sample.n) for sample in samples)
    walls = {}
    for what, n in kinds:
        rows = [sample for sample in samples if (sample.what, sample.n) == (what, n)]
        wall = walls[what, n] = median(row.wall_ms for row in rows)
        table.add_row(
            *(what, str(n), f"{sum(row.answered for row in rows)}/{n * len(rows)}"),
            f"{wall / 1e3:.2f}",
            *(f"{median(getattr(row, f'fork_p{p}_ms') for row in rows):.0f}" for p in (50, 95)),
            f"{median(row.exec_p50_ms for row in rows):.0f}",
            f"{median(row.private_bytes for row in rows) / n / MIB:.1f}",
            f"{median(row.read_bytes for row in rows) / MIB:.1f}",
        )
    console.print(table, highlight=False)
    boots = walls["cold boots", BOOTS] / BOOTS * max(SIZES)
    console.print(
        f"{max(SIZES)} cold boots at the same concurrency, from {BOOTS} measured: "
        f"{boots / 1e3:.1f} s, {boots / walls['forks', max(SIZES)]:.1f} x as long as the forks",
        highlight=False,
    )
    reads = {
        n: median(s.read_bytes for s in samples if (s.what, s.n) == (COLD, n))
        for n in (1, COLD_BURST)
    }
    if reads[1]:
        console.print(
            f"{COLD_BURST} forks with nothing cached read {reads[COLD_BURST] / reads[1]:.2f} x "
            "what one does",
            highlight=False,
        )


def main() -> int:
    """Measure bursts; the exit code is 1 if a fork did not answer."""
    parser = argparse.ArgumentParser(prog="python -m ratoon.bench.fanout")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--csv", type=Path, help="also write the samples as CSV to this file")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    if os.geteuid():
        console.print("run this as root: it empties the page cache", style="red")
        return 1

    async def run(home: Path) -> list[Burst]:
        async with Engine.open(home) as engine:
            bench = FanOut(engine, options.rounds, console)
            await bench.run()
            return bench.samples

    console.print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="ratoon-fanout-", dir=Path.cwd()) as name:
        samples = asyncio.run(run(Path(name) / "home"))
    show(console, samples)
    if options.csv:
        write_rows(options.csv, samples)
    return int(any(sample.answered < sample.n for sample in samples))


if __name__ == "__main__":
    sys.exit(main())
