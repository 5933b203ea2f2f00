"""What copy-on-write costs a guest that writes: `dd` to tmpfs, for the first time and again.

Beside a fork, a guest that Ratoon has booted, whose RAM is a private mapping too, and one in a
plain QEMU, whose RAM is anonymous memory. The speed is what `dd` says.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ratoon.bench.bench import Bench, Workshop
from ratoon.bench.peers import Guest as Booted
from ratoon.bench.peers import Peers
from ratoon.bench.plots import Plot, Series
from ratoon.bench.restore import Guest
from ratoon.bench.samples import Samples
from ratoon.bench.tables import Table, Target, spread
from ratoon.engine.sandbox.accelerator import choose_accelerator
from ratoon.engine.sandbox.engine import DISK_BYTES, RAM_BYTES
from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.errors import RatoonError
from ratoon.machine.guest.build import build_guest
from ratoon.machine.vmm.driver import Hardware

MIB_WRITTEN = 128
PASSES = ("first", "second")
GUESTS = {
    "fork": "a fork",
    "booted": "booted by Ratoon",
    "plain": "booted by a plain QEMU",
}
#: One process for both passes; the second writes over what the first has written.
_DD = f"dd if=/dev/zero of=/dev/shm/dd bs=1M count={MIB_WRITTEN} conv=notrunc"
_COMMAND = ["sh", "-c", f"{_DD} 2>&1 && {_DD} 2>&1 && rm /dev/shm/dd"]


@dataclass(frozen=True)
class Pass:
    """One `dd`; its speed in MB a second."""

    guest: str
    number: str
    round: int
    mb_per_second: float


async def measure(shop: Workshop) -> Samples:
    rows: list[Pass] = []
    base = await shop.base()
    probe = await choose_accelerator(build_guest())
    disk = await asyncio.to_thread(lambda: root_disk(resolve("debian"), DISK_BYTES))
    hardware = Hardware(RAM_BYTES, 1, probe.accelerator, probe.cpu)
    peers = Peers(shop.room, hardware, disk)
    for number in range(shop.iterations):
        shop.say(f"round {number + 1} of {shop.iterations}")
        async with await shop.engine.fork_one(base) as sandbox:
            rows += await _passes("fork", sandbox, number)
        async with shop.engine.bases.boot("debian") as booted:
            rows += await _passes("booted", Booted(booted.incarnation.channel), number)
        async with peers.booted(peers.own_disk) as peer:
            rows += await _passes("plain", peer, number)
    return {"tracking": rows}


async def _passes(kind: str, guest: Guest, number: int) -> list[Pass]:
    said = await guest.exec(_COMMAND)
    text = said if isinstance(said, str) else getattr(said, "stdout", b"").decode()
    speeds = re.findall(r"copied, ([0-9.e-]+) s", text)
    if len(speeds) != len(PASSES):
        raise RatoonError(f"dd said in a guest ({kind}): {text!r}")
    written = MIB_WRITTEN * (1 << 20) / 1e6
    return [
        Pass(kind, name, number, round(written / float(seconds), 1))
        for name, seconds in zip(PASSES, speeds, strict=True)
    ]


def _speeds(rows: Sequence[Pass], guest: str, number: str) -> list[float]:
    return [row.mb_per_second for row in rows if (row.guest, row.number) == (guest, number)]


def tables(samples: Samples) -> Sequence[Table]:
    rows = samples["tracking"]
    cells = []
    for guest, name in GUESTS.items():
        first, second = (_speeds(rows, guest, number) for number in PASSES)
        plain = median(_speeds(rows, "plain", "first"))
        cells.append(
            (
                name,
                str(len(first)),
                spread(first, 0),
                spread(second, 0),
                f"{median(first) / median(second):.2f}",
                f"{median(first) / plain:.2f}",
            )
        )
    columns = ("guest", "n", "first pass MB/s", "second pass", "first ÷ second", "first ÷ plain")
    title = f"dd of {MIB_WRITTEN} MiB to tmpfs; median (least…most)"
    return [Table(title, columns, tuple(cells), ("tracking",))]


def targets(samples: Samples) -> Sequence[Target]:
    rows = samples["tracking"]
    ratio = median(_speeds(rows, "fork", "first")) / median(_speeds(rows, "plain", "first"))
    what = "first writes in a fork / in a plain QEMU (dirty tracking elsewhere: 0.72)"
    return [Target(what, ratio, "≥", 0.72, "tracking")]


def plots(samples: Samples) -> Sequence[Plot]:
    rows = samples["tracking"]
    drawn = [
        Series(
            f"{number} pass",
            tuple((name, tuple(_speeds(rows, guest, number))) for guest, name in GUESTS.items()),
        )
        for number in PASSES
    ]
    return [Plot("tracking", "dd to tmpfs", "guest", "MB/s", tuple(drawn), linked=False)]


BENCH = Bench(
    name="tracking",
    title="Writing to memory",
    iterations=7,
    rows={"tracking": Pass},
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
)
