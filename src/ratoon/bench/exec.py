"""Commands in a guest: round trips, streams, and the warm interpreter against `python3 -c`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median

from ratoon.bench.bench import Bench, Workshop
from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import Samples, percentile
from ratoon.bench.served import served
from ratoon.bench.tables import Table, Target, spread
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import RatoonError
from ratoon.machine.guest import commands
from ratoon.units import MIB

STREAM_MIB = 32
STREAM_ROUNDS = 5
CODE = "print(6 * 7)"
TRIPS = {
    "agent": "a question to the agent",
    "exec": "exec true",
    "exec-http": "exec true, over HTTP",
    "eval": "eval, warm interpreter",
    "python": "python3 -c, the same code",
}
STREAMS = {"out": "stdout of a command", "in": "stdin of a command"}


@dataclass(frozen=True)
class Trip:
    """One round trip."""

    what: str
    round: int
    ms: float


@dataclass(frozen=True)
class Flow:
    """One stream of STREAM_MIB."""

    direction: str
    round: int
    mib_per_second: float


async def measure(shop: Workshop) -> Samples:
    trips: list[Trip] = []
    flows: list[Flow] = []
    base = await shop.base()
    async with served(shop.engine) as api, await shop.engine.fork_one(base) as sandbox:

        async def over_http() -> None:
            await api.exec(sandbox.id, ["true"])

        ways: dict[str, Callable[[], Awaitable[object]]] = {
            "agent": lambda: sandbox.request("hello", timeout=60),
            "exec": lambda: _exec(sandbox, ["true"]),
            "exec-http": over_http,
            "eval": lambda: _eval(sandbox),
            "python": lambda: _exec(sandbox, ["python3", "-c", CODE]),
        }
        for number in range(-2, shop.iterations):  # the first are for warming up
            if number % 50 == 0:
                shop.say(f"round {number + 1} of {shop.iterations}")
            for what, ask in ways.items():
                began = time.perf_counter()
                await ask()
                ms = (time.perf_counter() - began) * 1e3
                if number >= 0:
                    trips.append(Trip(what, number, round(ms, 3)))
        for number in range(STREAM_ROUNDS):
            shop.say(f"streams, round {number + 1} of {STREAM_ROUNDS}")
            flows += [await _stream(sandbox, direction, number) for direction in STREAMS]
    return {"exec": trips, "exec-streams": flows}


async def _exec(sandbox: Sandbox, argv: list[str]) -> bytes:
    result = await sandbox.exec(argv, timeout=60)
    if result.exit_code:
        raise RatoonError(f"{argv[0]}: {result.explain()}")
    return result.stdout


async def _eval(sandbox: Sandbox) -> None:
    result = await sandbox.eval(CODE, timeout=60)
    if result.error or result.stdout != b"42\n":
        raise RatoonError(f"eval: {result}")


async def _stream(sandbox: Sandbox, direction: str, number: int) -> Flow:
    size = STREAM_MIB * MIB
    began = time.perf_counter()
    if direction == "out":
        argv = ["head", "-c", str(size), "/dev/zero"]
        got = len(await _exec(sandbox, argv))
    else:
        argv = ["wc", "-c"]
        result = await commands.exec(sandbox, argv, stdin=bytes(size), timeout=120)
        got = int(result.stdout)
    took = time.perf_counter() - began
    if got != size:
        raise RatoonError(f"{got} of {size} bytes went through")
    return Flow(direction, number, round(STREAM_MIB / took, 2))


def _times(rows: Sequence[Trip], what: str) -> list[float]:
    return [row.ms for row in rows if row.what == what]


def tables(samples: Samples) -> Sequence[Table]:
    trips, flows = samples["exec"], samples["exec-streams"]
    cells = []
    for what, name in TRIPS.items():
        times = _times(trips, what)
        tail = (f"{percentile(times, percent):.1f}" for percent in (50, 90, 99))
        cells.append((name, str(len(times)), *tail, f"{min(times):.1f}", f"{max(times):.1f}"))
    columns = ("round trip, ms", "n", "p50", "p90", "p99", "least", "most")
    streams = tuple(
        (name, spread(row.mib_per_second for row in flows if row.direction == direction))
        for direction, name in STREAMS.items()
    )
    title = f"Streams of {STREAM_MIB} MiB; median (least…most)"
    return [
        Table("Round trips in one sandbox", columns, tuple(cells), ("exec",)),
        Table(title, ("stream", "MiB/s"), streams, ("exec-streams",)),
    ]


def targets(samples: Samples) -> Sequence[Target]:
    trips = samples["exec"]
    ratio = median(_times(trips, "python")) / median(_times(trips, "eval"))
    return [Target("python3 -c / eval in the warm interpreter", ratio, "≥", 1, "exec")]


def plots(samples: Samples) -> Sequence[Plot]:
    points = ((what, tuple(_times(samples["exec"], what))) for what in TRIPS)
    series = Series("a round trip", tuple(points))
    return [Plot("exec", "Round trips in one sandbox", "", "ms (log)", (series,), True, False)]


BENCH = Bench(
    name="exec",
    title="Commands",
    iterations=200,
    rows={"exec": Trip, "exec-streams": Flow},
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
)
