"""What a bench is, where it works, and how one is run: from a store of its own to files."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from ratoon import paths
from ratoon.artifacts import Progress
from ratoon.bench.machine import describe_machine
from ratoon.bench.plots import Plot
from ratoon.bench.samples import Samples, read_rows, write_rows
from ratoon.bench.tables import Table, Target
from ratoon.engine.sandbox.accelerator import choose_accelerator
from ratoon.engine.sandbox.engine import RAM_BYTES, Built, Engine
from ratoon.engine.sandbox.stages import Stages
from ratoon.errors import AlreadyExists, CommandFailed, NotFound
from ratoon.machine.guest.build import build_guest
from ratoon.units import MIB

#: The benches, each a module here, and what it measures.
NAMES = {
    "chain": "Build and fork chains of diffs, beside the textbook way; are they right?",
    "diff": "Write full and diff snapshots of guests that dirtied more and more.",
    "restore": "Fork until the first output, by depth, cache and RAM, beside QEMU's own ways.",
    "fanout": "Fork 1 to 100 at once.",
    "tracking": "Write to a guest's memory for the first and the second time.",
    "disk": "What a base and ten links take on ext4, xfs and btrfs.",
    "start": "Run the same web application of an image twice.",
    "exec": "Round trips, streams, and the warm interpreter.",
    "volumes": "Start PostgreSQL for the first time on a named volume, and on the disk.",
}
#: What benches call their snapshots.
PREFIX = "bench-"
#: Seconds that the command of a link of a chain may take.
BUILD_TIMEOUT = 600.0
#: Seconds that a bench waits for the machine to calm down after another one.
CALM_WITHIN = 240.0


@dataclass(frozen=True)
class Settings:
    """What the person asked for; `iterations` None: as many as the bench thinks right."""

    out_dir: Path
    iterations: int | None = None
    #: A snapshot of the store to take for the base; what is built on it stays in that store.
    base_tag: str | None = None
    #: Take the snapshots that an earlier run has left in the store.
    skip_build: bool = False


async def build_diff(engine: Engine, parent: str, tag: str, argv: list[str]) -> Built:
    """Snapshot `tag`, `argv` having run in a fork of `parent`. CommandFailed: it failed."""
    stages = Stages()
    with stages("fork"):
        sandbox = await engine.fork_one(parent)
    async with sandbox:
        with stages("exec"):
            result = await sandbox.exec(argv, timeout=BUILD_TIMEOUT)
            if result.exit_code:
                raise CommandFailed(f"snapshot {tag} was not made: {result.explain()}")
        with stages("branch"):
            branched = await engine.branch(sandbox, tag)
    return Built(branched, stages.ms, stages.total_ms)


@dataclass(frozen=True)
class Workshop:
    """What a bench works with."""

    engine: Engine
    iterations: int
    settings: Settings
    say: Progress
    #: Room for files; goes with the bench.
    room: Path
    #: The tags of what this run has built.
    built: set[str] = field(default_factory=set)

    @property
    def home(self) -> Path:
        return self.engine.store.home

    async def base(self, ram_bytes: int = RAM_BYTES) -> str:
        """The tag of a base with so much RAM: built, or as the settings say."""
        tag = self.base_tag(ram_bytes)
        if tag != self.settings.base_tag and not self.is_there(tag):
            await self.engine.bases.from_image(
                "debian", tag, ram_bytes=ram_bytes, progress=self.say
            )
            self.built.add(tag)
        return tag

    def base_tag(self, ram_bytes: int = RAM_BYTES) -> str:
        """What `base` is, or will be, called."""
        if (given := self.settings.base_tag) is not None:
            snapshot = self.engine.store.get(given)
            if snapshot.manifest.machine.ram_bytes == ram_bytes:
                return given
        return f"{PREFIX}base-{ram_bytes // MIB}"

    async def link(self, parent: str, tag: str, argv: list[str]) -> Built | None:
        """Snapshot `tag`, `argv` having run on `parent`; None if it was built before."""
        if self.is_there(tag):
            return None
        self.say(f"building {tag} on {parent}")
        self.built.add(tag)
        return await build_diff(self.engine, parent, tag, argv)

    def is_there(self, tag: str) -> bool:
        """Whether a snapshot is there already. AlreadyExists, NotFound: against the settings."""
        try:
            self.engine.store.get(tag)
        except NotFound:
            if self.settings.skip_build:
                raise NotFound(
                    f"no snapshot {tag}: run the bench with --base-tag and without --skip-build "
                    "first; what it builds stays then"
                ) from None
            return False
        if not self.settings.skip_build and tag not in self.built:
            raise AlreadyExists(
                f"snapshot {tag} is there from an earlier run: use it with --skip-build, or remove "
                f"it with `ratoon rmi --cascade`"
            )
        return True


@dataclass(frozen=True)
class Bench:
    """One bench. All that it says is computed from its rows, which is what its CSV files hold."""

    name: str
    title: str
    #: Rounds, unless somebody wants more or fewer.
    iterations: int
    #: The kind of the rows in each CSV file.
    rows: Mapping[str, type]
    measure: Callable[[Workshop], Awaitable[Samples]]
    tables: Callable[[Samples], Sequence[Table]]
    targets: Callable[[Samples], Sequence[Target]]
    plots: Callable[[Samples], Sequence[Plot]]
    #: What is wrong with the results themselves, as opposed to slow; None if nothing.
    wrong: Callable[[Samples], str | None] = lambda samples: None

    def read(self, directory: Path) -> Samples:
        """The rows of the CSV files in `directory`."""
        return {
            name: read_rows(directory / f"{name}.csv", kind) for name, kind in self.rows.items()
        }


@dataclass(frozen=True)
class Outcome:
    """What one run found; `document` is its JSON file."""

    bench: Bench
    samples: Samples
    document: dict[str, Any]


def load(name: str) -> Bench:
    """The bench `name`. NotFound."""
    if name not in NAMES:
        raise NotFound(f"no bench {name}; there are: {', '.join(NAMES)}")
    found = import_module(f"ratoon.bench.{name}").BENCH
    assert isinstance(found, Bench)
    return found


def wait_for_calm(say: Progress, within: float = CALM_WITHIN) -> None:
    """Wait until no more is under way than there are processors, for so many seconds at most.

    A bench that starts as another one ends would be said to have been measured under its load.
    """
    deadline = time.monotonic() + within
    while os.getloadavg()[0] > (os.cpu_count() or 1) and time.monotonic() < deadline:
        say(f"waiting for the machine to calm down, its load is {os.getloadavg()[0]:.1f}")
        time.sleep(5)


async def run(bench: Bench, settings: Settings, say: Progress) -> Outcome:
    """Measure, and write the CSV files and the JSON file to `settings.out_dir`."""
    settings.out_dir.mkdir(parents=True, exist_ok=True)
    began, before = time.time(), os.getloadavg()
    async with _workshop(bench, settings, say) as shop:
        samples = await bench.measure(shop)
    accelerator = (await choose_accelerator(build_guest())).accelerator
    document = {
        "bench": bench.name,
        "began_at_unix": round(began),
        "seconds": round(time.time() - began),
        "iterations": settings.iterations or bench.iterations,
        "accelerator": accelerator,
        "machine": describe_machine(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "targets": [{**asdict(each), "met": each.met} for each in bench.targets(samples)],
        "samples": {name: [asdict(row) for row in rows] for name, rows in samples.items()},
    }
    for name, rows in samples.items():
        write_rows(settings.out_dir / f"{name}.csv", rows)
    path = settings.out_dir / f"{bench.name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return Outcome(bench, samples, document)


@asynccontextmanager
async def _workshop(bench: Bench, settings: Settings, say: Progress) -> AsyncIterator[Workshop]:
    """In a store of its own, unless the settings name snapshots of the person's."""
    given = settings.base_tag is not None or settings.skip_build
    with tempfile.TemporaryDirectory(
        prefix=f"{bench.name}-", dir=settings.out_dir.absolute()
    ) as name:
        home = paths.home() if given else Path(name, "home")
        room = Path(name, "room")
        room.mkdir()
        async with Engine.open(home) as engine:
            yield Workshop(engine, settings.iterations or bench.iterations, settings, say, room)
