"""`make demo`: the main job for real, measured. A chain of diff snapshots, and forks of each head.

It builds a base, a chain L1 → L2 → L3 whose links each use the one before, and Flat, which has the
same in one diff; then it forks from each of them in turn, round by round, so that noise hits all
alike, and probes every fork. The base's forks are the negative control: there the probe must fail.
What must not depend on the RAM's size is measured on a second base with four times as much.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ratoon.bench.demo_report import WRITTEN_MIB, Measured, as_facts, show, write_csv
from ratoon.bench.machine import describe_machine
from ratoon.bench.steps import HEADS, LARGE_HEADS, Head, link_command, probe
from ratoon.errors import RatoonError
from ratoon.sandbox.engine import MIB, Engine
from ratoon.sandbox.sandbox import Sandbox

ROUNDS = 10
#: Rounds of first forks: every image but the bases' is removed before each.
FIRST_ROUNDS = 5
PAUSE_ROUNDS = 5
SMALL, LARGE = 512 * MIB, 2048 * MIB

WRITE_MEMORY = f"""
import os
block = os.urandom(1 << 20)
with open('/dev/shm/written', 'wb') as file:
    for number in range({WRITTEN_MIB}):
        file.write(number.to_bytes(8, 'big') + block[8:])
"""


async def timed(sandbox: Sandbox, argv: list[str]) -> float:
    """Milliseconds of one exec that must succeed."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    result = await sandbox.exec(argv, timeout=60)
    if result.exit_code:
        raise RatoonError(f"{argv[0]} failed in {sandbox.id}: {result.stderr!r}")
    return (loop.time() - start) * 1e3


class Demo:
    def __init__(self, engine: Engine, rounds: int, console: Console) -> None:
        self._engine = engine
        self._console = console
        self.measured = Measured(rounds)

    def say(self, message: str) -> None:
        self._console.print(f"[dim]·[/dim] {message}", highlight=False)

    async def run(self) -> None:
        await self._build(HEADS, SMALL)
        await self._first_forks(HEADS)
        await self._make_images(HEADS)
        await self._rounds()
        await self._build(LARGE_HEADS, LARGE)
        await self._first_forks(LARGE_HEADS)
        await self._pauses()

    async def _build(self, heads: tuple[Head, ...], ram_bytes: int) -> None:
        for head in heads:
            if head.parent is None:
                built = await self._engine.from_image(
                    "debian", head.tag, ram_bytes=ram_bytes, progress=self.say
                )
                self.say(f"{head.tag}: cold boot {built.stages['boot'] / 1e3:.1f} s")
            else:
                built = await self._engine.snapshot_diff(
                    head.parent, head.tag, link_command(head.adds)
                )
                self.say(f"{head.tag} on {head.parent}: {built.total_ms / 1e3:.2f} s")
            self.measured.built[head.tag] = built

    async def _first_forks(self, heads: tuple[Head, ...]) -> None:
        """Fork every head as if for the first time: only the base has an image."""
        self.say(f"first forks of heads without an image, {FIRST_ROUNDS} rounds")
        for _ in range(FIRST_ROUNDS):
            for head in heads:
                if head.parent:
                    self._engine.evict_image(head.tag)
            for head in heads:
                samples = self.measured.samples[head.tag]
                async with await self._engine.fork_one(head.tag) as sandbox:
                    samples.first_fork.append(sandbox.fork_ms)
                    samples.first_stages.append(sandbox.stages)

    async def _make_images(self, heads: tuple[Head, ...]) -> None:
        """A second fork of a head has its image made; wait for that."""
        self.say("second forks: images are made in the background")
        for head in heads:
            await (await self._engine.fork_one(head.tag)).kill()
        await self._engine.settle()

    async def _rounds(self) -> None:
        with self._console.status("") as status:
            for number in range(self.measured.rounds):
                status.update(
                    f"round {number + 1} of {self.measured.rounds}: fork, exec and probe every head"
                )
                for head in HEADS:
                    await self._fork_and_probe(head)
        self.say(f"{self.measured.rounds} rounds of {len(HEADS)} forks done")

    async def _fork_and_probe(self, head: Head) -> None:
        samples = self.measured.samples[head.tag]
        async with await self._engine.fork_one(head.tag) as sandbox:
            samples.fork.append(sandbox.fork_ms)
            samples.stages.append(sandbox.stages)
            samples.first_exec.append(await timed(sandbox, ["true"]))
            if head.has:
                samples.probes_passed += await probe(sandbox, head.has)
                samples.probes_run += len(head.has)
            else:
                samples.control_failed += not await probe(sandbox, (1,))
                samples.control_run += 1

    async def _pauses(self) -> None:
        """Branch sandboxes that wrote to memory, small and large RAM in turn."""
        self.say(f"branching sandboxes that wrote {WRITTEN_MIB} MiB, {PAUSE_ROUNDS} rounds")
        sandboxes = {tag: await self._engine.fork_one(tag) for tag in self.measured.pauses}
        for sandbox in sandboxes.values():
            await timed(sandbox, ["python3", "-c", WRITE_MEMORY])
        for number in range(PAUSE_ROUNDS):
            for tag, sandbox in sandboxes.items():
                branched = await self._engine.branch(sandbox, f"written-{tag}-{number}")
                layer = branched.snapshot.manifest.layers[-1].memory
                self.measured.pauses[tag].append(
                    {
                        "pause_ms": branched.pause_ms,
                        "captured_pages": branched.captured_pages,
                        "layer_bytes": layer.size,
                        "stages": branched.stages,
                    }
                )
        for sandbox in sandboxes.values():
            await sandbox.kill()


async def measure(home: Path, rounds: int, console: Console) -> dict[str, Any]:
    """Run the demo in the store `home`; returns what is written to demo.json."""
    async with Engine.open(home) as engine:
        demo = Demo(engine, rounds, console)
        await demo.run()
        facts = {
            "machine": describe_machine(),
            **as_facts(demo.measured),
        }
        show(console, demo.measured)
    return facts


def main() -> int:
    """Run the demo; the exit code is 0 if every probe passed and every control failed."""
    parser = argparse.ArgumentParser(prog="python -m ratoon.bench.demo", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="forks of each head")
    parser.add_argument("--build", type=Path, default=Path("build"), help="where demo.json goes")
    parser.add_argument("--csv", type=Path, help="also write every fork as CSV to this file")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    home = options.build / "demo"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    try:
        facts = asyncio.run(measure(home, options.rounds, console))
    except RatoonError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(home, ignore_errors=True)
    (options.build / "demo.json").write_text(json.dumps(facts, indent=1) + "\n")
    if options.csv:
        write_csv(options.csv, facts)
    console.print(f"every sample: {options.build / 'demo.json'}", highlight=False)
    if not facts["correct"]:
        console.print("a probe or a control is wrong", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
