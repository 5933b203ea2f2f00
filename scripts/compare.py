#!/usr/bin/env python3
"""Compares checkouts of Ratoon, or one under several QEMUs, by turns on this machine.

    scripts/compare.py [--csv FILE] NAME=CHECKOUT[:DIRECTORY] NAME=CHECKOUT[:DIRECTORY] …
    scripts/compare.py --read FILE

Each is a checkout in which `make setup` was run; a directory is looked in for programs before all
others, so one with an older QEMU has that used. Each has a store of its own, which is removed at
the end, and in each round does the same once, in random order: a fork of a chain of depth 3, the
first command in it, a second one, a branch of it, and a burst of forks. The table has medians, and
in brackets the ratio to the first, as the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

DEPTH = 3
BURST = 25
#: Rounds that are thrown away: files are read and images made for the first time.
WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", metavar="NAME=CHECKOUT[:DIRECTORY]")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--csv", type=Path, help="where every sample goes")
    parser.add_argument("--read", type=Path, help="show what a run before has written there")
    options = parser.parse_args()
    if options.read:
        print(table(read(options.read)))
        return
    if len(options.checkouts) < 2:
        parser.error("name two checkouts, or more")
    rows = measure(options.checkouts, options.rounds)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            written = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            written.writeheader()
            written.writerows(rows)
    print(table(rows))


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {what: value if what == "which" else float(value) for what, value in row.items()}
        for row in rows
    ]


def measure(checkouts: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row a round and checkout: milliseconds by what was measured."""
    with ExitStack() as held:
        workers = {}
        for given in checkouts:
            name, _, where = given.partition("=")
            checkout, _, first = where.partition(":")
            home = held.enter_context(tempfile.TemporaryDirectory(prefix="compare-"))
            workers[name] = held.enter_context(
                subprocess.Popen(
                    [f"{checkout}/.venv/bin/python", __file__, "--work-in", home],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env={**os.environ, "PATH": f"{first}:{os.environ['PATH']}".lstrip(":")},
                )
            )
        for worker in workers.values():
            answer(worker)
        rows = []
        for number in range(-WARM_UP, rounds):
            took = {}
            for name in random.sample(list(workers), len(workers)):
                worker = workers[name]
                assert worker.stdin
                worker.stdin.write("go\n")
                worker.stdin.flush()
                took[name] = {what: round(ms, 3) for what, ms in answer(worker).items()}
            about = {"round": number, "load": os.getloadavg()[0]}
            if number >= 0:
                rows += [{**about, "which": name, **took[name]} for name in workers]
        for worker in workers.values():
            assert worker.stdin
            worker.stdin.close()
        return rows


def answer(worker: subprocess.Popen[str]) -> dict[str, float]:
    assert worker.stdout
    line = worker.stdout.readline()
    if not line:
        sys.exit("a worker has ended; see what it said above")
    answered: dict[str, float] = json.loads(line)
    return answered


def table(rows: list[dict[str, Any]]) -> str:
    """Medians, and the medians of the ratios to the first within a round."""
    names = dict.fromkeys(row["which"] for row in rows)
    samples = {name: [row for row in rows if row["which"] == name] for name in names}
    first = next(iter(samples.values()))
    lines = [" ".join([f"{'ms':16}", *(f"{name:>18}" for name in names)])]
    for what in list(rows[0])[3:]:
        cells = []
        for taken in samples.values():
            median = statistics.median(row[what] for row in taken)
            ratio = statistics.median(b[what] / a[what] for a, b in zip(first, taken, strict=True))
            cells.append(f"{median:>10,.1f} ({ratio:.3f})")
        lines.append(" ".join([f"{what:16}", *cells]))
    loads = [row["load"] for row in rows]
    lines.append(f"{len(first)} rounds; load average {min(loads):.1f} to {max(loads):.1f}")
    return "\n".join(lines)


async def work(home: Path) -> None:
    """A worker: a round for each line of its input."""
    from ratoon.engine.sandbox.engine import Engine

    async def timed(result: Any) -> tuple[float, Any]:
        began = time.perf_counter()
        value = await result
        return (time.perf_counter() - began) * 1e3, value

    async with Engine.open(home) as engine:
        await engine.bases.from_image("debian", "link0")
        for number in range(DEPTH):
            async with await engine.fork_one(f"link{number}") as sandbox:
                await sandbox.exec(["sh", "-c", f"echo {number} >>/root/chain"])
                await engine.branch(sandbox, f"link{number + 1}")
        print("{}", flush=True)
        tip = f"link{DEPTH}"
        while await asyncio.to_thread(sys.stdin.readline):
            took = {}
            took["fork"], sandbox = await timed(engine.fork_one(tip))
            before = cpu_ms(sandbox.pid)
            took["first command"], _ = await timed(sandbox.exec(["echo", "first"]))
            took["its CPU"] = cpu_ms(sandbox.pid) - before
            took["second command"], _ = await timed(sandbox.exec(["echo", "second"]))
            took["branch"], branched = await timed(engine.branch(sandbox, "made"))
            took["its pause"] = branched.pause_ms
            await sandbox.kill()
            await engine.delete("made")
            took[f"burst of {BURST}"], forks = await timed(engine.fork(tip, BURST))
            await asyncio.gather(*(fork.kill() for fork in forks))
            print(json.dumps(took), flush=True)


def cpu_ms(pid: int) -> float:
    """The processor's time that all threads of a process have had."""
    stats = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in stats) / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work-in"]:
        asyncio.run(work(Path(sys.argv[2]) / "home"))
    else:
        main()
