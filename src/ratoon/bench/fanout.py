"""Many forks at once: how long, how much memory, and how much is read from the disk.

Each burst ends when every fork has answered a command. Beside the forks, cold boots at the same
concurrency; forks from a pool of machines that wait; bursts with nothing in the page cache. On xfs,
forks that share the image's one inode against forks that are each given a copy of it, written or
reflinked: the page cache is kept by inode, so copies share none.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ratoon.bench.bench import Bench, Workshop
from ratoon.bench.loop_mounts import mounted
from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import Samples, forget_files, percentile, read_bytes
from ratoon.bench.tables import Table, Target, spread
from ratoon.bench.textbook import OwnImage, data_of, images_from
from ratoon.engine.sandbox.base import BootedGuest
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.fork import CONCURRENT_STARTS
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import HostError, RatoonError
from ratoon.files import clone_range
from ratoon.machine.guest import commands
from ratoon.machine.host.usage import usage
from ratoon.store.memory.cache import OpenImage
from ratoon.units import MIB

SIZES = (1, 10, 25, 50, 100)
BURST = 25
#: Cold boots: enough for each place of the concurrency to have several.
BOOTS = 2 * CONCURRENT_STARTS
DISK_BYTES = 8 << 30

Outcomes = Sequence[Sandbox | BootedGuest | RatoonError]


@dataclass(frozen=True)
class Burst:
    """One burst. Times in ms; bytes of all its machines together.

    `read_bytes`: what they, and who started them, had fetched from disks.
    """

    what: str
    n: int
    round: int
    answered: int
    wall_ms: float
    fork_p50_ms: float
    fork_p95_ms: float
    exec_p50_ms: float
    private_bytes: int
    read_bytes: int


async def measure(shop: Workshop) -> Samples:
    rows: list[Burst] = []
    engine, base = shop.engine, await shop.base()
    await (await engine.fork_one(base)).kill()
    for number in range(shop.iterations):
        shop.say(f"round {number + 1} of {shop.iterations}")
        for n in SIZES:
            rows.append(await _burst("forks", number, n, engine.fork(base, n)))
        for n in (1, BURST):
            rows.append(await _pooled(engine, base, number, n))
            await engine.settle()
            await asyncio.to_thread(forget_files, shop.home)
            rows.append(await _burst("nothing cached", number, n, engine.fork(base, n)))
        async with AsyncExitStack() as stack:
            rows.append(await _burst("cold boots", number, BOOTS, _boot(engine, stack)))
    with mounted("xfs", DISK_BYTES) as root:
        async with Engine.open(root / "home") as other:
            await other.bases.from_image("debian", "base", progress=shop.say)
            rows += await _by_inodes(other, root, shop)
    return {"fanout": rows}


async def _pooled(engine: Engine, tag: str, number: int, n: int) -> Burst:
    """All of the forks find a machine that waits."""
    snapshot = engine.store.get(tag)
    await engine.pool.keep(snapshot, n)
    try:
        await engine.pool.filled()
        return await _burst("from a pool", number, n, engine.fork(tag, n))
    finally:
        await engine.pool.drop(tag)


async def _by_inodes(engine: Engine, root: Path, shop: Workshop) -> list[Burst]:
    rows = []
    ways: dict[str, Callable[[int, int], bool] | None] = {
        "xfs, one inode": None,
        "xfs, a copy each": _copy,
        "xfs, a reflink each": _reflink,
    }
    for number in range(shop.iterations):
        shop.say(f"one inode or many, round {number + 1} of {shop.iterations}")
        for what, way in ways.items():
            for cached in (True, False):
                if not cached:
                    await asyncio.to_thread(forget_files, engine.store.home)
                with _copies(engine, root, way) if way else nullcontext():
                    name = what if cached else f"{what}, nothing cached"
                    rows.append(await _burst(name, number, BURST, engine.fork("base", BURST)))
    return rows


@contextmanager
def _copies(engine: Engine, root: Path, copy: Callable[[int, int], bool]) -> Iterator[None]:
    """Each fork in the block maps a new file with the content of its image."""
    find = engine.images.open

    def copied(memory_root: str, ram_pages: int) -> OpenImage | None:
        image = find(memory_root, ram_pages)
        if image is None:
            return None
        with image:
            path = root / f"copy-{time.monotonic_ns()}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
            if not copy(image.fd, fd):
                raise HostError(f"an image could not be copied on {root}")
        return OwnImage(path, fd)

    with images_from(engine, copied):
        yield


def _copy(source: int, target: int) -> bool:
    """The data, as `cp --reflink=never --sparse=always` does: holes stay holes."""
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for start, end in data_of(source, size):
        for offset in range(start, end, MIB):
            os.pwrite(target, os.pread(source, min(MIB, end - offset), offset), offset)
    return True


def _reflink(source: int, target: int) -> bool:
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    return clone_range(source, 0, size, target, 0)


async def _boot(engine: Engine, stack: AsyncExitStack) -> Outcomes:
    places = asyncio.Semaphore(CONCURRENT_STARTS)

    async def one() -> BootedGuest | RatoonError:
        async with places:
            try:
                return await stack.enter_async_context(engine.bases.boot("debian"))
            except RatoonError as error:
                return error

    return await asyncio.gather(*(one() for _ in range(BOOTS)))


async def _burst(what: str, number: int, n: int, starting: Coroutine[Any, Any, Outcomes]) -> Burst:
    """Until each of them has answered a command; then all sandboxes are killed."""
    before = read_bytes("self")
    began = time.perf_counter()
    outcomes = await starting
    sandboxes = [outcome for outcome in outcomes if isinstance(outcome, Sandbox)]
    runs = [each.incarnation for each in outcomes if not isinstance(each, RatoonError)]
    try:
        execs = await asyncio.gather(*map(_first_exec, runs))
        wall = time.perf_counter() - began
        forks = [sandbox.fork_ms for sandbox in sandboxes] or [0.0]
        return Burst(
            what=what,
            n=n,
            round=number,
            answered=sum(answered for answered, _ in execs),
            wall_ms=round(wall * 1e3, 1),
            fork_p50_ms=round(percentile(forks, 50), 1),
            fork_p95_ms=round(percentile(forks, 95), 1),
            exec_p50_ms=round(median(ms for _, ms in execs), 1),
            private_bytes=sum(map(_private_bytes, runs)),
            read_bytes=read_bytes("self") - before + sum(map(_read_bytes, runs)),
        )
    finally:
        await asyncio.gather(*(sandbox.kill() for sandbox in sandboxes))


async def _first_exec(run: Incarnation) -> tuple[bool, float]:
    began = time.perf_counter()
    result = await commands.exec(run.channel, ["hostname"], timeout=120)
    took = (time.perf_counter() - began) * 1e3
    return result.stdout.decode().strip() == run.channel.name, took


def _private_bytes(run: Incarnation) -> int:
    used = usage(run.machine.pid, run.overlay)
    return used.memory_bytes if used else 0


def _read_bytes(run: Incarnation) -> int:
    return read_bytes(run.machine.pid)


def _of(rows: Sequence[Burst], what: str, n: int) -> list[Burst]:
    return [row for row in rows if (row.what, row.n) == (what, n)]


def _wall(rows: Sequence[Burst], what: str, n: int) -> float:
    return median(row.wall_ms for row in _of(rows, what, n))


def tables(samples: Samples) -> Sequence[Table]:
    rows = samples["fanout"]
    cells = []
    for what, n in sorted(dict.fromkeys((row.what, row.n) for row in rows)):
        found = _of(rows, what, n)
        cells.append(
            (
                what,
                str(n),
                f"{sum(row.answered for row in found)}/{n * len(found)}",
                spread((row.wall_ms / 1e3 for row in found), 2),
                f"{median(row.wall_ms for row in found) / n:.0f}",
                *(
                    f"{median(getattr(row, f'fork_p{p}_ms') for row in found):.0f}"
                    for p in (50, 95)
                ),
                f"{median(row.exec_p50_ms for row in found):.0f}",
                f"{median(row.private_bytes for row in found) / n / MIB:.1f}",
                f"{median(row.read_bytes for row in found) / MIB:.1f}",
            )
        )
    columns = (
        *("burst", "n", "answered", "wall s", "ms each", "fork p50 ms", "p95"),
        *("first exec ms", "private MiB each", "disk read MiB"),
    )
    title = "Bursts until all have answered a command; median (least…most)"
    return [Table(title, columns, tuple(cells), ("fanout",))]


def targets(samples: Samples) -> Sequence[Target]:
    rows = samples["fanout"]
    cold = "nothing cached"
    (burst,) = {row.n for row in rows if row.what == cold and row.n > 1}
    one = median(row.read_bytes for row in _of(rows, cold, 1))
    many = median(row.read_bytes for row in _of(rows, cold, burst))
    found = []
    if one:
        what = f"disk read by {burst} forks with nothing cached / by one"
        found.append(Target(what, many / one, "≤", 1.5, "fanout"))
    (boots,) = {row.n for row in rows if row.what == "cold boots"}
    largest = max(row.n for row in rows)
    each = _wall(rows, "cold boots", boots) / boots * largest / _wall(rows, "forks", largest)
    what = f"{largest} cold boots at the same concurrency / {largest} forks"
    return [*found, Target(what, each, "≥", 10, "fanout")]


def plots(samples: Samples) -> Sequence[Plot]:
    rows = samples["fanout"]
    sizes = sorted({row.n for row in rows if row.what == "forks"})
    forks = Series(
        "forks", tuple((str(n), tuple(r.wall_ms for r in _of(rows, "forks", n))) for n in sizes)
    )
    names = sorted({row.what for row in rows if row.what.startswith("xfs")})
    inodes = []
    for cached in (True, False):
        points = (
            (name.split(", ")[1], tuple(r.wall_ms / r.n for r in rows if r.what == name))
            for name in names
            if name.endswith("nothing cached") != cached
        )
        inodes.append(Series("warm" if cached else "nothing cached", tuple(points)))
    (burst,) = {row.n for row in rows if row.what in names}
    title = f"{burst} forks on xfs, until all have answered"
    return [
        Plot(
            "fanout", "Forks at once, until all have answered", "forks", "ms (log)", (forks,), True
        ),
        Plot("fanout-inodes", title, "each fork maps", "ms a fork", tuple(inodes), linked=False),
    ]


def wrong(samples: Samples) -> str | None:
    missing = sum(row.n - row.answered for row in samples["fanout"])
    return f"{missing} machines did not answer" if missing else None


BENCH = Bench(
    name="fanout",
    title="Many at once",
    iterations=3,
    rows={"fanout": Burst},
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
    wrong=wrong,
)
