"""How long a live branch keeps its sandbox waiting, and what that does not depend on.

::

    python -m ratoon.bench.pauses [--rounds N] [--csv FILE]

Each sandbox writes 64 MiB to memory and is branched. Beside the plain one: with four times the RAM,
at the end of a chain of eight diffs, and with 512 MiB of disk writes that no disk has seen yet.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from ratoon.bench.machine import describe_machine
from ratoon.bench.samples import MIB, percentile, write_rows
from ratoon.errors import RatoonError
from ratoon.sandbox.engine import Engine
from ratoon.sandbox.sandbox import Sandbox

ROUNDS = 9
DEPTH = 8
WRITTEN_MIB = 64
DISK_MIB = 512
#: Pages that no two are equal and none is zero, kept alive by a process that sleeps.
WRITE_MEMORY = f"""
import os, subprocess, sys
subprocess.run(["mount", "-o", "remount,size=90%", "/dev/shm"], check=True)
with open("/dev/shm/written", "wb") as file:
    for _ in range({WRITTEN_MIB}):
        file.write(os.urandom(1 << 20))
"""
#: Past the guest's own page cache, into the host's.
WRITE_DISK = f"dd if=/dev/zero of=/root/written bs=1M count={DISK_MIB} oflag=direct 2>&1"


@dataclass(frozen=True)
class Case:
    name: str
    tag: str
    disk: bool = False


CASES = (
    Case("512 MiB, depth 0", "small"),
    Case("2 GiB, depth 0", "large"),
    Case(f"512 MiB, depth {DEPTH}", "deep"),
    Case(f"512 MiB, depth 0, {DISK_MIB} MiB on their way to disk", "small", disk=True),
)


@dataclass(frozen=True)
class Pause:
    """One branch. Times in ms: the guest stood still for `pause_ms`, the snapshot took `total`."""

    case: str
    round: int
    pause_ms: float
    total_ms: float
    captured_pages: int
    stored_bytes: int


async def measure(engine: Engine, rounds: int, console: Console) -> list[Pause]:
    """`rounds` branches of each case, in turn."""

    def say(message: str) -> None:
        console.print(f"[dim]·[/dim] {message}", highlight=False)

    await engine.from_image("debian", "small", ram_bytes=512 * MIB, progress=say)
    await engine.from_image("debian", "large", ram_bytes=2048 * MIB, progress=say)
    parent = "small"
    for depth in range(1, DEPTH + 1):
        tag = "deep" if depth == DEPTH else f"deep{depth}"
        await engine.snapshot_diff(parent, tag, ["sh", "-c", f"echo {depth} >/root/depth"])
        parent = tag
    samples = []
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for case in CASES:
            async with await engine.fork_one(case.tag) as sandbox:
                await _run(sandbox, ["python3", "-c", WRITE_MEMORY])
                if case.disk:
                    await _run(sandbox, ["sh", "-c", WRITE_DISK])
                live = await engine.begin_branch(sandbox, "branched")
                branched = await live.done
                stored = branched.snapshot.manifest.layers[-1].memory.size
                total = sum(branched.stages.values())
                samples.append(
                    Pause(
                        case.name,
                        number,
                        branched.pause_ms,
                        round(total, 1),
                        branched.captured_pages,
                        stored,
                    )
                )
            await engine.delete("branched")
    return samples


async def _run(sandbox: Sandbox, argv: list[str]) -> None:
    result = await sandbox.exec(argv, timeout=300)
    if result.exit_code:
        raise RatoonError(f"{argv[0]} failed in {sandbox.id}: {result}")


def show(console: Console, samples: list[Pause]) -> None:
    """Print the percentiles of each case, and how its median compares with the first's."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "pause p50 ms", "p95", "to the first", "pages", "stored MiB", "in all ms"):
        table.add_column(name, justify="right" if name else "left")
    first = median(sample.pause_ms for sample in samples if sample.case == CASES[0].name)
    for case in CASES:
        rows = [sample for sample in samples if sample.case == case.name]
        pause = median(row.pause_ms for row in rows)
        table.add_row(
            case.name,
            f"{pause:.1f}",
            f"{percentile((row.pause_ms for row in rows), 95):.1f}",
            f"{pause / first:.2f}",
            f"{median(row.captured_pages for row in rows):.0f}",
            f"{median(row.stored_bytes for row in rows) / MIB:.1f}",
            f"{median(row.total_ms for row in rows):.0f}",
        )
    console.print(table, highlight=False)


def main() -> int:
    """Measure pauses."""
    parser = argparse.ArgumentParser(prog="python -m ratoon.bench.pauses")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="branches of each case")
    parser.add_argument("--csv", type=Path, help="also write the samples as CSV to this file")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)

    async def run(home: Path) -> list[Pause]:
        async with Engine.open(home) as engine:
            return await measure(engine, options.rounds, console)

    console.print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="ratoon-pauses-", dir=Path.cwd()) as name:
        samples = asyncio.run(run(Path(name) / "home"))
    show(console, samples)
    if options.csv:
        write_rows(options.csv, samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
