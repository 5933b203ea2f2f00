"""What compression at rest frees, and what it costs whoever needs the layers later.

A part of the bench `disk`. The guest of each link has read files of its own disk, so its memory is
full of what real guests have there. Processor time is this process's, all threads of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from ratoon.bench.samples import MIB, milliseconds
from ratoon.bench.tables import Table, spread
from ratoon.sandbox.engine import Engine
from ratoon.snapshot.compress import Form, rewrite_layers
from ratoon.snapshot.links import ram_pages, read_links

#: Which files the guest of each link has read, by their first letter.
READ = ("[a-g]", "[h-o]", "[p-z]")


@dataclass(frozen=True)
class Step:
    """One step with all layers of the chain. `layers_bytes`: what they take on the disk then."""

    round: int
    step: str
    layers_bytes: int
    wall_ms: float
    cpu_ms: float


async def measure(engine: Engine, base: str, rounds: int) -> list[Step]:
    """Links on `base`, compressed and made plain again, and the head's image made of both."""
    for number, letters in enumerate(READ):
        parent = f"read{number - 1}" if number else base
        script = f"find /usr -xdev -type f -name '{letters}*' -exec cat {{}} + >/dev/null"
        await engine.snapshot_diff(parent, f"read{number}", ["sh", "-c", script])
    await engine.settle()
    return await asyncio.to_thread(_measure, engine, f"read{len(READ) - 1}", rounds)


def _measure(engine: Engine, head: str, rounds: int) -> list[Step]:
    snapshot = engine.store.get(head)
    rows: list[Step] = []

    def do(number: int, step: str, what: Callable[[], object]) -> None:
        began, cpu = time.perf_counter(), time.process_time()
        what()
        took, used = time.perf_counter() - began, time.process_time() - cpu
        paths = [snapshot.memory_path(layer) for layer in range(snapshot.depth + 1)]
        taken = sum(path.stat().st_blocks * 512 for path in paths)
        rows.append(Step(number, step, taken, milliseconds(took), milliseconds(used)))

    def make_image() -> None:
        engine.images.make(read_links(snapshot), ram_pages(snapshot))

    def rewrite(form: Form) -> None:
        rewrite_layers(engine.store, form, [head])

    for number in range(rounds):
        engine.images.remove(snapshot.manifest.memory_root)
        do(number, "image of plain layers", make_image)
        do(number, "compress", lambda: rewrite("compressed"))
        engine.images.remove(snapshot.manifest.memory_root)
        do(number, "image of compressed layers", make_image)
        do(number, "make plain again", lambda: rewrite("plain"))
    return rows


def table(rows: Sequence[Step]) -> Table:
    cells = []
    for step in dict.fromkeys(row.step for row in rows):
        found = [row for row in rows if row.step == step]
        cells.append(
            (
                step,
                f"{median(row.layers_bytes for row in found) / MIB:.0f}",
                spread((row.wall_ms for row in found), 0),
                spread((row.cpu_ms for row in found), 0),
            )
        )
    title = f"Compression at rest: a base and {len(READ)} links on it, 512 MiB of RAM"
    columns = ("step", "memory layers MiB", "ms", "processor ms")
    return Table(title, columns, tuple(cells), ("disk-at-rest",))
