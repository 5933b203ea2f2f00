"""`make demo`: the main job for real, measured. A chain of diff snapshots, and forks of each head.

It builds a base, a chain L1 → L2 → L3 whose links each use the one before, and Flat, which has the
same in one diff; then it forks from each of them in turn, round by round, so that noise hits all
alike, and probes every fork. The base's forks are the negative control: there the probe must fail.
What must not depend on the RAM's size is measured on a second base with four times as much.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from ratoon.bench.bench import build_diff
from ratoon.bench.machine import describe_machine
from ratoon.bench.steps import HEADS, LARGE_HEADS, Head, link_command, probe
from ratoon.engine.sandbox.engine import Built, Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import RatoonError
from ratoon.units import MIB

ROUNDS = 10
#: Rounds of first forks: every image but the bases' is removed before each.
FIRST_ROUNDS = 5
PAUSE_ROUNDS = 5
SMALL, LARGE = 512 * MIB, 2048 * MIB

#: What a sandbox writes to memory before its branches' pauses are measured.
WRITTEN_MIB = 64

WRITE_MEMORY = f"""
import os
block = os.urandom(1 << 20)
with open('/dev/shm/written', 'wb') as file:
    for number in range({WRITTEN_MIB}):
        file.write(number.to_bytes(8, 'big') + block[8:])
"""


@dataclass
class Samples:
    """Everything measured of one head; times in milliseconds."""

    fork: list[float] = field(default_factory=list)
    first_fork: list[float] = field(default_factory=list)
    first_exec: list[float] = field(default_factory=list)
    stages: list[dict[str, float]] = field(default_factory=list)
    first_stages: list[dict[str, float]] = field(default_factory=list)
    probes_passed: int = 0
    probes_run: int = 0
    control_failed: int = 0
    control_run: int = 0


@dataclass
class Measured:
    """All that one run of the demo measured."""

    rounds: int
    samples: dict[str, Samples] = field(
        default_factory=lambda: {head.tag: Samples() for head in (*HEADS, *LARGE_HEADS)}
    )
    built: dict[str, Built] = field(default_factory=dict)
    #: By base: the branches of a sandbox that wrote WRITTEN_MIB to memory.
    pauses: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"base": [], "base-2g": []}
    )

    def correct(self) -> bool:
        """Did every probe pass, and every control fail?"""
        return all(
            samples.probes_passed == samples.probes_run
            and samples.control_failed == samples.control_run
            for samples in self.samples.values()
        )

    def layer(self, tag: str) -> dict[str, Any]:
        """What snapshot `tag` added; bytes are those of its memory.bin."""
        snapshot = self.built[tag].branched.snapshot
        memory = snapshot.manifest.layers[-1].memory
        st = snapshot.memory_path(snapshot.depth).stat()
        return {
            "tag": tag,
            "depth": snapshot.depth,
            "pages": memory.entries,
            "stored_pages": memory.stored,
            "logical_bytes": st.st_size,
            "physical_bytes": st.st_blocks * 512,
            "build_stages": self.built[tag].stages,
            "branch_stages": self.built[tag].branched.stages,
            "pause_ms": self.built[tag].branched.pause_ms,
            "build_ms": self.built[tag].total_ms,
        }


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
                built = await self._engine.bases.from_image(
                    "debian", head.tag, ram_bytes=ram_bytes, progress=self.say
                )
                self.say(f"{head.tag}: cold boot {built.stages['boot'] / 1e3:.1f} s")
            else:
                command = link_command(head.adds)
                built = await build_diff(self._engine, head.parent, head.tag, command)
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


def as_facts(measured: Measured) -> dict[str, Any]:
    """What demo.json holds of the measurement, every sample included."""
    return {
        "accelerator": measured.built["base"].branched.snapshot.manifest.machine.accelerator,
        "rounds": measured.rounds,
        "correct": measured.correct(),
        "ratios": ratios(measured),
        "heads": {tag: asdict(samples) for tag, samples in measured.samples.items()},
        "layers": [measured.layer(tag) for tag in measured.built],
        "pauses": measured.pauses,
    }


def show(console: Console, measured: Measured) -> None:
    """Print the tables."""
    console.print(heads_table(measured))
    console.print(layers_table(measured))
    console.print(ratios_table(ratios(measured)))


def heads_table(measured: Measured) -> Table:
    table = Table(title=f"Heads: forks of each in turn, {measured.rounds} rounds (milliseconds)")
    table.add_column("head")
    for name in ("depth", "first fork\nno image p50", "fork p50", "fork p90", "first exec p50"):
        table.add_column(name, justify="right")
    table.add_column("probes\npassed", justify="right")
    table.add_column("control\nfailed", justify="right")
    for head in HEADS:
        samples = measured.samples[head.tag]
        table.add_row(
            head.tag,
            str(len(head.has) if head.tag != "Flat" else 1),
            f"{median(samples.first_fork):.0f}" if head.parent else "-",
            f"{median(samples.fork):.0f}",
            f"{percentile(samples.fork, 90):.0f}",
            f"{median(samples.first_exec):.0f}",
            f"{samples.probes_passed}/{samples.probes_run}" if head.has else "-",
            f"{samples.control_failed}/{samples.control_run}" if not head.has else "-",
        )
    return table


def layers_table(measured: Measured) -> Table:
    table = Table(title="Layers: what each snapshot added, and how long its making took")
    table.add_column("layer")
    for name in ("pages", "logical", "physical", "pause ms", "build s"):
        table.add_column(name, justify="right")
    table.add_column("by stage, ms (of the branch)")
    for tag in measured.built:
        layer = measured.layer(tag)
        stages = {**layer["build_stages"]}
        stages.pop("build", None)
        table.add_row(
            tag,
            f"{layer['pages']:,}",
            f"{layer['logical_bytes'] / MIB:.2f} MiB",
            f"{layer['physical_bytes'] / MIB:.2f} MiB",
            f"{layer['pause_ms']:.1f}",
            f"{sum(stages.values()) / 1e3:.2f}",
            f"{_stages(stages)} ({_stages(layer['branch_stages'])})",
        )
    return table


def _stages(stages: dict[str, float]) -> str:
    """Those that took half a millisecond or more."""
    return " ".join(f"{name} {ms:.0f}" for name, ms in stages.items() if ms >= 0.5)


def ratios_table(ratios: list[dict[str, Any]]) -> Table:
    table = Table(title="Ratios within this run")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_column("should be", justify="right")
    for ratio in ratios:
        good = "green" if ratio["holds"] else "red"
        table.add_row(ratio["what"], f"[{good}]{ratio['value']}[/{good}]", ratio["limit"])
    return table


def ratios(measured: Measured) -> list[dict[str, Any]]:
    """What the design promises, each with its limit and whether this run kept it."""
    samples = measured.samples
    base, base_2g = median(samples["base"].fork), median(samples["base-2g"].first_fork)
    base_first = median(samples["base"].first_fork)
    boot = measured.built["base"].stages["boot"]
    pauses = {tag: median([p["pause_ms"] for p in found]) for tag, found in measured.pauses.items()}
    rows: list[dict[str, Any]] = []

    def add(what: str, value: float, limit: float, show: str = "{:.2f}") -> None:
        rows.append(
            {
                "what": what,
                "value": show.format(value),
                "exact": value,
                "limit": f"≤ {limit:g}",
                "holds": value <= limit,
            }
        )

    add("fork of L3 / fork of base (p50)", median(samples["L3"].fork) / base, 1.10)
    add("fork of Flat / fork of base (p50)", median(samples["Flat"].fork) / base, 1.10)
    add(
        "first fork of L3 / fork of base, 512 MiB",
        median(samples["L3"].first_fork) / base_first,
        1.5,
    )
    add(
        "first fork of L3 / fork of base, 2 GiB", median(samples["L3-2g"].first_fork) / base_2g, 1.5
    )
    add("fork of base / cold boot, until the agent answered", base / boot, 1 / 20, "{:.4f}")
    for tag in ("L1", "L2", "L3", "Flat"):
        layer = measured.layer(tag)
        room = 1.1 * layer["pages"] * 4096 + 64 * 1024
        size = max(layer["logical_bytes"], layer["physical_bytes"])
        add(f"{tag}'s memory.bin / (1.1 x pages x 4 KiB + 64 KiB)", size / room, 1)
    add(f"pause after {WRITTEN_MIB} MiB written, 512 MiB (ms)", pauses["base"], 200, "{:.1f}")
    add(
        f"pause after {WRITTEN_MIB} MiB written, 2 GiB / 512 MiB",
        pauses["base-2g"] / pauses["base"],
        1.25,
    )
    return rows


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that at least `percent` % of the values do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def write_csv(path: Path, facts: dict[str, Any]) -> None:
    """Every fork of the run, a line each: head, which series, its number, milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["head", "series", "number", "milliseconds"])
        for tag, samples in facts["heads"].items():
            for series in ("fork", "first_fork", "first_exec"):
                for number, milliseconds in enumerate(samples[series]):
                    writer.writerow([tag, series, number, f"{milliseconds:.3f}"])


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
