"""What the demo shows: tables, and the ratios that the design promises."""

from __future__ import annotations

import csv
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ratoon.bench.steps import HEADS, LARGE_HEADS
from ratoon.sandbox.engine import MIB, Built

#: What a sandbox writes to memory before its branches' pauses are measured.
WRITTEN_MIB = 64


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


def median(values: list[float]) -> float:
    return statistics.median(values)


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
