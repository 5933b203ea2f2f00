"""PostgreSQL's first start with its data on a named volume, beside the same on the sandbox's disk.

In each round a fork makes a cluster and starts it, on both, by turns. The two do not promise the
same: what is `fsync`ed on a volume is on the host's disk; on the sandbox's disk it is in the host's
page cache. So what the host takes to make as many files durable is measured beside it.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from ratoon.bench.bench import Bench, Workshop
from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import Samples, milliseconds
from ratoon.bench.tables import Table, Target, spread
from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import RatoonError
from ratoon.machine.volumes import named

IMAGE = "debian:bookworm+postgresql"
BIN = "/usr/lib/postgresql/15/bin"
PLACES = {"disk": "the sandbox's disk", "volume": "a named volume"}
HOST = "host"
#: Files that PostgreSQL makes, and bytes in each of those that the host makes.
FILES, SIZE = 1000, 8192
LIMIT = 1800.0
FIRST_START = f"""
set -e
install -d -o postgres $1
cd $1
as() {{ setpriv --reuid postgres --regid postgres --init-groups "$@"; }}
as {BIN}/initdb -D $1/data --no-locale -E UTF8 >/dev/null
as {BIN}/pg_ctl -D $1/data -w -o '-k /tmp' -l $1/log start >/dev/null
"""
STOP = f"""
setpriv --reuid postgres --regid postgres --init-groups {BIN}/pg_ctl -D $1/data stop >/dev/null
cat /proc/self/mountstats
"""
#: A row of /proc/self/mountstats: what the kernel has asked, and how often.
_ASKED = re.compile(r"^\s+([A-Z]+): (\d+) (?:\d+ ){7}", re.MULTILINE)


@dataclass(frozen=True)
class FirstStart:
    """One first start; `calls`: what the guest's kernel has asked its server, in all.

    `cpu_ms`: processor time of the machine, and of this process, which serves the volume.
    """

    place: str
    round: int
    ms: float
    cpu_ms: float
    calls: int


async def measure(shop: Workshop) -> Samples:
    rows: list[FirstStart] = []
    tag = "bench-postgresql"
    await shop.engine.bases.from_image(IMAGE, tag)
    for number in range(shop.iterations):
        for place in list(PLACES) if number % 2 else reversed(PLACES):
            shop.say(f"round {number + 1} of {shop.iterations}: {PLACES[place]}")
            rows.append(await _first_start(shop, tag, place, number))
        directory = named.directory(shop.engine.store.home)
        cpu = time.process_time()
        ms = milliseconds(await asyncio.to_thread(_host, directory))
        rows.append(FirstStart(HOST, number, ms, milliseconds(time.process_time() - cpu), 0))
    return {"volumes": rows}


async def _first_start(shop: Workshop, tag: str, place: str, number: int) -> FirstStart:
    volume = Volume(source=f"bench-{number}", target="/data")
    volumes = (volume,) if place == "volume" else ()
    async with await shop.engine.fork_one(tag, SandboxOptions(volumes=volumes)) as sandbox:
        began, cpu = time.perf_counter(), _cpu_seconds(sandbox)
        await _sh(sandbox, FIRST_START)
        took, used = time.perf_counter() - began, _cpu_seconds(sandbox) - cpu
        asked = _ASKED.findall(await _sh(sandbox, STOP))
        calls = sum(int(count) for name, count in asked if name != "NULL")
    return FirstStart(place, number, milliseconds(took), milliseconds(used), calls)


def _cpu_seconds(sandbox: Sandbox) -> float:
    """What the machine and this process have had of processors."""
    fields = Path(f"/proc/{sandbox.machine.pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


async def _sh(sandbox: Sandbox, script: str) -> str:
    result = await sandbox.exec(["sh", "-c", script, "sh", "/data/pg"], timeout=LIMIT)
    if result.exit_code:
        raise RatoonError(f"PostgreSQL: {result.explain()}: {result.stderr.decode()[-500:]}")
    return result.stdout.decode()


def _host(directory: Path) -> float:
    """Seconds to make that many files durable, one after another, where the volumes are."""
    names = [directory / f".bench-{number}" for number in range(FILES)]
    began = time.perf_counter()
    for name in names:
        with name.open("wb", buffering=0) as file:
            file.write(bytes(SIZE))
            os.fsync(file.fileno())
    took = time.perf_counter() - began
    for name in names:
        name.unlink()
    return took


def _times(rows: Sequence[FirstStart], place: str, field: str = "ms") -> list[float]:
    """In seconds."""
    return [getattr(row, field) / 1e3 for row in rows if row.place == place]


def tables(samples: Samples) -> Sequence[Table]:
    rows = samples["volumes"]
    what = {**PLACES, HOST: f"{FILES} files of 8 KiB made durable by the host"}
    cells = []
    for place, name in what.items():
        calls = spread((row.calls for row in rows if row.place == place), 0)
        times = (spread(_times(rows, place, field)) for field in ("ms", "cpu_ms"))
        cells.append((name, *times, calls if place == "volume" else ""))
    columns = ("PostgreSQL's first start on", "s", "of processors, s", "calls")
    title = "From no cluster to one that answers; median (least…most)"
    return [Table(title, columns, tuple(cells), ("volumes",))]


def targets(samples: Samples) -> Sequence[Target]:
    rows = samples["volumes"]
    found = []
    for field, what in (("ms", "time"), ("cpu_ms", "processor time")):
        pairs = zip(_times(rows, "volume", field), _times(rows, "disk", field), strict=True)
        ratio = median(volume / disk for volume, disk in pairs)
        found.append(
            Target(f"first start on a volume / on the disk, {what}", ratio, "≤", 2, "volumes")
        )
    return found


def plots(samples: Samples) -> Sequence[Plot]:
    points = ((place, tuple(_times(samples["volumes"], place))) for place in (*PLACES, HOST))
    series = Series("a first start", tuple(points))
    return [Plot("volumes", "PostgreSQL's first start", "", "s", (series,), False, False)]


BENCH = Bench(
    name="volumes",
    title="Volumes",
    iterations=3,
    rows={"volumes": FirstStart},
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
)
