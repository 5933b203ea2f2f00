"""What the bench of chains found: its rows, and the tables, targets and plots that follow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import MIB, Samples, percentile
from ratoon.bench.tables import Table, Target, spread


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
