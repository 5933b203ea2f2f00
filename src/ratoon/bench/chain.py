"""Chains: what building and forking them costs at each depth, and whether the forks are right.

Each fork is one `POST /v1/sandboxes`, timed by the client. The heads take turns, in another order
each round, and so do the two ways: Ratoon's, and the textbook's (`textbook.py`), which makes the
memory that the same fork then maps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from ratoon.bench.bench import PREFIX, Bench, Workshop
from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import Samples, forget_files, milliseconds, percentile
from ratoon.bench.served import Api, served
from ratoon.bench.steps import link_command, passed, probe_command
from ratoon.bench.tables import Table, Target, spread
from ratoon.bench.textbook import Textbook, hashing_speed
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import RatoonError
from ratoon.store.snapshot.links import ram_pages, read_links
from ratoon.units import MIB

#: Depths that are forked, of the one chain.
DEPTHS = (0, 1, 2, 3, 8, 16, 32)
#: Heads that are forked by the engine alone as well.
BY_THE_ENGINE = ("0", "32")
#: Beyond this depth the textbook way takes seconds a fork, and has fewer rounds.
SHALLOW = 3
DEEP_ROUNDS = 3


@dataclass(frozen=True)
class Built:
    """One link of a chain, as it was built. Times in ms; bytes of its layer's files."""

    head: str
    depth: int
    total_ms: float
    fork_ms: float
    exec_ms: float
    branch_ms: float
    pause_ms: float
    pages: int
    memory_logical_bytes: int
    memory_physical_bytes: int
    disk_physical_bytes: int


@dataclass(frozen=True)
class Spawn:
    """One fork. Times in ms: the request as its client saw it, the fork as the engine did.

    `way`: ratoon, textbook, or engine: without HTTP. The last three are parts of a textbook fork.
    """

    head: str
    depth: int
    way: str
    cache: str
    round: int
    request_ms: float
    fork_ms: float
    first_exec_ms: float
    stages: str
    hash_ms: float = 0.0
    copy_ms: float = 0.0
    overlay_ms: float = 0.0


@dataclass(frozen=True)
class Correct:
    """The probes of one fork: how many were made, must pass, and passed."""

    head: str
    way: str
    cache: str
    round: int
    probes: int
    expected: int
    passed: int


@dataclass(frozen=True)
class Hashing:
    """SHA-256 of a base's memory file by the textbook's code, and by hashlib in memory, bytes/s."""

    round: int
    textbook: float
    hashlib: float


@dataclass(frozen=True)
class Head:
    """A snapshot to fork, and the steps that its forks must have."""

    name: str
    tag: str
    depth: int
    has: tuple[int, ...]


def _heads(base: str) -> tuple[Head, ...]:
    steps = tuple(range(1, max(DEPTHS) + 1))
    return (
        *(Head(str(depth), _tag(depth, base), depth, steps[:depth]) for depth in DEPTHS),
        Head("flat", f"{PREFIX}flat", 1, steps[:3]),
        Head("compacted", f"{PREFIX}compacted", 0, steps[:3]),
    )


def _tag(depth: int, base: str) -> str:
    return f"{PREFIX}{depth}" if depth else base


class _Chain:
    def __init__(self, shop: Workshop, api: Api, heads: tuple[Head, ...]) -> None:
        self._shop = shop
        self._api = api
        self._heads = heads
        self._textbook = Textbook(shop.room / "textbook")
        self._textbook.directory.mkdir()
        self.spawns: list[Spawn] = []
        self.correct: list[Correct] = []

    async def prepare(self) -> list[Hashing]:
        """All images are made, and the textbook's files; how fast each way hashes."""
        self._shop.say("second forks: images are made in the background")
        for _ in range(2):
            for head in self._heads:
                await (await self._shop.engine.fork_one(head.tag)).kill()
            await self._shop.engine.settle()
        self._shop.say("writing the chain in the textbook's format")
        for head in self._heads:
            snapshot = self._shop.engine.store.get(head.tag)
            links = await asyncio.to_thread(read_links, snapshot)
            await asyncio.to_thread(self._textbook.write, links, ram_pages(snapshot))
        file = min(self._textbook.directory.iterdir(), key=lambda path: path.stat().st_ctime)
        return [
            Hashing(number, *await asyncio.to_thread(hashing_speed, file)) for number in range(5)
        ]

    async def rounds(self) -> None:
        for number in range(self._shop.iterations):
            self._shop.say(f"round {number + 1} of {self._shop.iterations}")
            turn = number % len(self._heads)
            for head in (*self._heads[turn:], *self._heads[:turn]):
                await self._fork(head, number, "warm")
                if head.name in BY_THE_ENGINE:
                    await self._fork_by_the_engine(head, number)
                if self._is_textbooks_turn(head, number, DEEP_ROUNDS):
                    with self._textbook.forks_of(self._shop.engine):
                        await self._fork(head, number, "warm", textbook=True)

    async def cold_rounds(self) -> None:
        """No head but the base has an image, and nothing is in the page cache."""
        rounds = max(DEEP_ROUNDS, self._shop.iterations // 4)
        for number in range(rounds):
            self._shop.say(f"nothing cached, round {number + 1} of {rounds}")
            for head in self._heads:
                await self._forget()
                await self._fork(head, number, "cold")
                if self._is_textbooks_turn(head, number, 1):
                    await self._forget()
                    with self._textbook.forks_of(self._shop.engine):
                        await self._fork(head, number, "cold", textbook=True)

    def _is_textbooks_turn(self, head: Head, number: int, deep_rounds: int) -> bool:
        if head.name == "compacted":  # the textbook has none
            return False
        return head.depth <= SHALLOW or number < deep_rounds

    async def _forget(self) -> None:
        engine = self._shop.engine
        await engine.settle()
        for head in self._heads[1:]:
            engine.evict_image(head.tag)
        await asyncio.to_thread(forget_files, self._shop.home, self._textbook.directory)

    async def _fork(self, head: Head, number: int, cache: str, *, textbook: bool = False) -> None:
        self._textbook.last = None
        forked = await self._api.fork(head.tag)
        sandbox = forked.body["id"]
        try:
            first = await self._api.exec(sandbox, ["echo", "ok"])
            spawn = Spawn(
                head=head.name,
                depth=head.depth,
                way="textbook" if textbook else "ratoon",
                cache=cache,
                round=number,
                request_ms=forked.ms,
                fork_ms=forked.body["fork_ms"],
                first_exec_ms=first.ms,
                stages=" ".join(f"{name}={ms}" for name, ms in forked.body["stages_ms"].items()),
            )
            if textbook:
                assert self._textbook.last, "the fork did not map what was assembled"
                spawn = replace(spawn, **asdict(self._textbook.last))
            self.spawns.append(spawn)
            await self._probe(head, number, spawn.way, cache, sandbox)
        finally:
            await self._api.kill(sandbox)

    async def _fork_by_the_engine(self, head: Head, number: int) -> None:
        """What HTTP adds shows beside this."""
        began = time.perf_counter()
        (made,) = await self._shop.engine.fork(head.tag, 1)
        seen = milliseconds(time.perf_counter() - began)
        if not isinstance(made, Sandbox):
            raise made
        stages = " ".join(f"{name}={ms}" for name, ms in made.stages.items())
        await made.kill()
        self.spawns.append(
            Spawn(head.name, head.depth, "engine", "warm", number, seen, made.fork_ms, 0.0, stages)
        )

    async def _probe(self, head: Head, number: int, way: str, cache: str, sandbox: str) -> None:
        """Has the fork what its chain added? The base, the negative control, must not have it."""
        steps = head.has or (1, 2, 3)
        answer = await self._api.exec(sandbox, probe_command(steps))
        found = passed(answer.body["stdout"], steps, sandbox)
        expected = len(head.has)
        self.correct.append(Correct(head.name, way, cache, number, len(steps), expected, found))


async def _build(shop: Workshop, base: str) -> list[Built]:
    """The chain, one head with the first three steps at once, and the third one compacted."""
    rows = []
    for depth in range(1, max(DEPTHS) + 1):
        parent = _tag(depth - 1, base)
        rows.append(await _link(shop, parent, f"{PREFIX}{depth}", str(depth), depth, (depth,)))
    rows.append(await _link(shop, base, f"{PREFIX}flat", "flat", 1, (1, 2, 3)))
    if not shop.is_there(f"{PREFIX}compacted"):
        began = time.perf_counter()
        await shop.engine.compact(f"{PREFIX}3", f"{PREFIX}compacted", progress=shop.say)
        took = milliseconds(time.perf_counter() - began)
        rows.append(_built(shop, f"{PREFIX}compacted", "compacted", 0, took, 0.0, {}))
    return [row for row in rows if row]


async def _link(
    shop: Workshop, parent: str, tag: str, head: str, depth: int, steps: tuple[int, ...]
) -> Built | None:
    built = await shop.link(parent, tag, link_command(steps))
    if built is None:
        return None
    return _built(shop, tag, head, depth, built.total_ms, built.branched.pause_ms, built.stages)


def _built(
    shop: Workshop,
    tag: str,
    head: str,
    depth: int,
    total_ms: float,
    pause_ms: float,
    stages: dict[str, float],
) -> Built:
    snapshot = shop.engine.store.get(tag)
    memory = snapshot.memory_path(snapshot.depth).stat()
    disk = snapshot.disk_path(snapshot.depth).stat()
    return Built(
        head=head,
        depth=depth,
        total_ms=total_ms,
        fork_ms=stages.get("fork", 0.0),
        exec_ms=stages.get("exec", 0.0),
        branch_ms=stages.get("branch", 0.0),
        pause_ms=pause_ms,
        pages=snapshot.manifest.layers[-1].memory.entries,
        memory_logical_bytes=memory.st_size,
        memory_physical_bytes=memory.st_blocks * 512,
        disk_physical_bytes=disk.st_blocks * 512,
    )


async def measure(shop: Workshop) -> Samples:
    base = await shop.base()
    built = await _build(shop, base)
    async with served(shop.engine) as api:
        chain = _Chain(shop, api, _heads(base))
        hashing = await chain.prepare()
        await chain.rounds()
        await chain.cold_rounds()
    if not chain.spawns:
        raise RatoonError("there was no round")
    samples: dict[str, list[object]] = {
        "chain-spawn": [*chain.spawns],
        "correctness": [*chain.correct],
        "chain-hashing": [*hashing],
    }
    return {"chain-build": built, **samples} if built else samples


def tables(samples: Samples) -> Sequence[Table]:
    found = [_spawns(samples["chain-spawn"]), _stages(samples["chain-spawn"])]
    found.append(_textbook(samples["chain-spawn"]))
    if "chain-build" in samples:
        found.append(_builds(samples["chain-build"]))
    return [*found, _correct(samples["correctness"])]


def _of(spawns: Iterable[Spawn], head: str, way: str, cache: str = "warm") -> list[Spawn]:
    return [each for each in spawns if (each.head, each.way, each.cache) == (head, way, cache)]


def _names(spawns: Iterable[Spawn]) -> list[str]:
    """The heads: by depth, then those that are not of the chain."""
    names = dict.fromkeys(each.head for each in spawns)
    return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))


def _spawns(spawns: Sequence[Spawn]) -> Table:
    rows = []
    base = median(each.request_ms for each in _of(spawns, "0", "ratoon"))
    for name in _names(spawns):
        warm, cold = _of(spawns, name, "ratoon"), _of(spawns, name, "ratoon", "cold")
        requests = [each.request_ms for each in warm]
        rows.append(
            (
                name,
                str(len(warm)),
                spread(requests),
                f"{percentile(requests, 90):.1f}",
                f"{median(requests) / base:.3f}",
                spread(each.first_exec_ms for each in warm),
                spread(each.request_ms for each in cold),
            )
        )
    for name in _names(each for each in spawns if each.way == "engine"):
        times = [each.request_ms for each in _of(spawns, name, "engine")]
        rows.append(
            (
                f"{name}, by the engine, without HTTP",
                str(len(times)),
                spread(times),
                f"{percentile(times, 90):.1f}",
                f"{median(times) / base:.3f}",
                "",
                "",
            )
        )
    columns = ("depth", "n", "POST ms", "p90", "to depth 0", "first exec ms", "nothing cached, ms")
    return Table(
        "Forks: one POST each, median (least…most)", columns, tuple(rows), ("chain-spawn",)
    )


def _stages(spawns: Sequence[Spawn]) -> Table:
    """Medians of each stage, as every fork tells them."""
    names = [name for name in _names(spawns) if name in {"0", "1", "3", "8", "16", "32"}]
    by_head = {
        name: [_parsed(each.stages) for each in _of(spawns, name, "ratoon")] for name in names
    }
    stages = list(
        dict.fromkeys(stage for found in by_head.values() for each in found for stage in each)
    )
    rows = []
    for name in names:
        medians = (median(each.get(stage, 0.0) for each in by_head[name]) for stage in stages)
        rows.append((name, *(f"{ms:.1f}" for ms in medians)))
    return Table("Stages of a fork, median ms", ("depth", *stages), tuple(rows), ("chain-spawn",))


def _parsed(stages: str) -> dict[str, float]:
    pairs = (each.split("=") for each in stages.split())
    return {name: float(ms) for name, ms in pairs}


def _textbook(spawns: Sequence[Spawn]) -> Table:
    rows = []
    for name in _names(spawns):
        theirs = _of(spawns, name, "textbook")
        cold = _of(spawns, name, "textbook", "cold")
        ours_cold = _of(spawns, name, "ratoon", "cold")
        if not theirs or name == "compacted":
            continue
        rows.append(
            (
                name,
                str(len(theirs)),
                spread((each.request_ms for each in theirs), 0),
                *(
                    f"{median(getattr(each, f'{part}_ms') for each in theirs):.0f}"
                    for part in _PARTS
                ),
                f"{_ratio(theirs, _of(spawns, name, 'ratoon')):.1f}",
                spread((each.request_ms for each in cold), 0),
                f"{_ratio(cold, ours_cold):.1f}",
            )
        )
    columns: tuple[str, ...] = (
        "depth",
        "n",
        "POST ms",
        "hash",
        "copy base",
        "copy links",
        "÷ Ratoon's",
    )
    title = "The same forks with memory made the textbook way"
    columns = (*columns, "nothing cached, ms", "÷ Ratoon's")
    return Table(title, columns, tuple(rows), ("chain-spawn",))


_PARTS = ("hash", "copy", "overlay")


def _ratio(above: Sequence[Spawn], below: Sequence[Spawn]) -> float:
    return median(each.request_ms for each in above) / median(each.request_ms for each in below)


def _builds(built: Sequence[Built]) -> Table:
    rows = tuple(
        (
            each.head,
            *(f"{ms:,.0f}" for ms in (each.total_ms, each.fork_ms, each.exec_ms, each.branch_ms)),
            f"{each.pause_ms:.1f}",
            f"{each.pages:,}",
            f"{each.memory_logical_bytes / MIB:.2f}",
            f"{each.memory_physical_bytes / MIB:.2f}",
            f"{each.disk_physical_bytes / MIB:.2f}",
        )
        for each in built
        if each.head in {"1", "2", "3", "4", "8", "16", "32", "flat", "compacted"}
    )
    columns: tuple[str, ...] = ("depth", "build ms", "fork", "exec", "branch", "pause ms", "pages")
    columns = (*columns, "memory MiB", "on disk", "disk layer MiB")
    return Table(
        "Links: how long each took to build, and what it holds", columns, rows, ("chain-build",)
    )


def _correct(correct: Sequence[Correct]) -> Table:
    rows = []
    for name in dict.fromkeys(each.head for each in correct):
        found = [each for each in correct if each.head == name]
        right = sum(each.passed == each.expected for each in found)
        what = "control: none may pass" if name == "0" else "all must pass"
        passed, probes = sum(each.passed for each in found), sum(each.probes for each in found)
        rows.append((name, what, f"{passed}/{probes}", f"{right}/{len(found)}"))
    columns = ("depth", "probes", "passed", "forks that are right")
    return Table("Correctness, both ways, warm and cold", columns, tuple(rows), ("correctness",), 2)


def wrong(samples: Samples) -> str | None:
    bad = [each for each in samples["correctness"] if each.passed != each.expected]
    if bad:
        return f"{len(bad)} forks have not what they should have, or the control has: {bad[0]}"
    if not any(each.expected == 0 for each in samples["correctness"]):
        return "there was no control"
    return None


def targets(samples: Samples) -> Sequence[Target]:
    spawns = samples["chain-spawn"]
    base = _of(spawns, "0", "ratoon")
    found = [
        Target(
            f"fork at depth {depth} / at depth 0",
            _ratio(_of(spawns, str(depth), "ratoon"), base),
            "≤",
            1.05,
            "chain-spawn",
        )
        for depth in (3, 32)
    ]
    by_the_engine = _ratio(_of(spawns, "32", "engine"), _of(spawns, "0", "engine"))
    what = "fork at depth 32 / at depth 0, by the engine"
    found.append(Target(what, by_the_engine, "≤", 1.05, "chain-spawn"))
    found.append(
        Target(
            "the textbook way / ours, depth 3",
            _ratio(_of(spawns, "3", "textbook"), _of(spawns, "3", "ratoon")),
            "≥",
            15,
            "chain-spawn",
        )
    )
    speeds = [each.textbook / each.hashlib for each in samples["chain-hashing"]]
    what = "the textbook's hashing / hashlib's speed"
    return [*found, Target(what, median(speeds), "≥", 0.8, "chain-hashing")]


def plots(samples: Samples) -> Sequence[Plot]:
    spawns = samples["chain-spawn"]
    depths = [name for name in _names(spawns) if name.isdigit()]
    series = []
    for way, cache in (
        ("ratoon", "warm"),
        ("ratoon", "cold"),
        ("textbook", "warm"),
        ("textbook", "cold"),
    ):
        points = tuple(
            (name, tuple(each.request_ms for each in _of(spawns, name, way, cache)))
            for name in depths
            if _of(spawns, name, way, cache)
        )
        series.append(Series(f"{way}, {'nothing cached' if cache == 'cold' else 'warm'}", points))
    title = "A fork, by the depth of its chain"
    return [
        Plot("chain-spawn", title, "depth of the chain", "POST, ms (log)", tuple(series), log=True),
        Plot(
            "chain-ours", f"{title}: Ratoon alone", "depth of the chain", "POST, ms", (series[0],)
        ),
    ]


BENCH = Bench(
    name="chain",
    title="Chains",
    iterations=20,
    rows={
        "chain-build": Built,
        "chain-spawn": Spawn,
        "correctness": Correct,
        "chain-hashing": Hashing,
    },
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
    wrong=wrong,
)
