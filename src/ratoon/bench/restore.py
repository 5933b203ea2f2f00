"""From a snapshot to the first output: by depth, by what is cached, by RAM; and QEMU's own ways.

A restore ends when `echo` has printed, so what is put off until the guest runs is counted as well.
Half of the RAM is in use, with random bytes, in all guests whose RAM is compared.
The ways take turns within each round, each once nothing is left to be written of what came before.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, suppress
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol

from ratoon.bench.bench import PREFIX, Bench, Workshop
from ratoon.bench.dirtying import program
from ratoon.bench.peers import Peers
from ratoon.bench.plots import Plot, Series
from ratoon.bench.samples import Samples, forget_files, milliseconds
from ratoon.bench.tables import Table, Target, spread
from ratoon.bench.virsh import Domain, Virsh
from ratoon.engine.sandbox.accelerator import choose_accelerator
from ratoon.engine.sandbox.engine import DISK_BYTES
from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.machine.guest.build import build_guest
from ratoon.machine.vmm.driver import Hardware
from ratoon.units import MIB

#: Of a guest of 512 MiB, of which little is in use.
DEPTHS = (0, 3, 16)
#: MiB; half of it in use.
SIZES = (512, 1024, 2048, 4096)
#: Peers with nothing cached, and heads whose image is to be made first, have so many rounds.
SLOW_ROUNDS = 3
ECHO = ["echo", "ok"]

WAYS = {
    "ratoon": "Ratoon, a fork",
    "loadvm": "QEMU, -loadvm",
    "migrate": "QEMU, from a migration to a file",
    "virsh": "libvirt, virsh restore",
    "boot": "a cold boot",
}
CACHES = {"warm": "warm", "dropped": "page cache dropped", "evicted": "and the image evicted"}


@dataclass(frozen=True)
class Restore:
    """One restore, until `echo` had printed. Times in ms; `ready_ms`: until it could be asked.

    `filled`: half of the RAM is in use.
    """

    way: str
    ram_mib: int
    depth: int
    filled: bool
    cache: str
    round: int
    first_output_ms: float
    ready_ms: float
    stages: str


@dataclass(frozen=True)
class Saved:
    """What it took to save a filled guest the peers' ways, ms; bytes of the migration's file."""

    ram_mib: int
    savevm_ms: float
    migrate_ms: float
    virsh_ms: float
    state_bytes: int


class Guest(Protocol):
    """A sandbox or a peer."""

    async def exec(self, argv: list[str]) -> object: ...


async def measure(shop: Workshop) -> Samples:
    await _build_chain(shop)
    for size in SIZES:
        await _build_filled(shop, size)
    restores, saved = [], []
    probe = await choose_accelerator(build_guest())
    disk = await asyncio.to_thread(lambda: root_disk(resolve("debian"), DISK_BYTES))
    peers, domains = {}, {}
    async with AsyncExitStack() as held:
        virsh = await held.enter_async_context(Virsh.running(shop.room / "libvirt"))
        for size in SIZES:
            directory = shop.room / f"peer-{size}"
            directory.mkdir()
            hardware = Hardware(size * MIB, 1, probe.accelerator, probe.cpu)
            peers[size] = Peers(directory, hardware, disk)
            domains[size] = Domain(virsh, peers[size].boot(directory / "domain.qcow2"))
            saved.append(await _save(shop, peers[size], domains[size], size))
        for number in range(shop.iterations):
            shop.say(f"round {number + 1} of {shop.iterations}")
            for depth in DEPTHS:
                restores += await _forks(shop, _tag(shop, depth), 512, depth, number)
            for size in SIZES:
                tag = f"{PREFIX}filled-{size}"
                restores += await _forks(shop, tag, size, 1, number, filled=True)
                restores += await _peers(peers[size], domains[size], size, number)
    return {"restore": restores, "restore-saves": saved}


def _tag(shop: Workshop, depth: int) -> str:
    return f"{PREFIX}restore-{depth}" if depth else shop.base_tag()


async def _build_chain(shop: Workshop) -> None:
    await shop.base()
    for depth in range(1, max(DEPTHS) + 1):
        argv = ["sh", "-c", f"echo {depth} >/root/depth"]
        await shop.link(_tag(shop, depth - 1), _tag(shop, depth), argv)


async def _build_filled(shop: Workshop, size: int) -> None:
    base = await shop.base(size * MIB)
    argv = ["python3", "-c", program(size // 2)]
    await shop.link(base, f"{PREFIX}filled-{size}", argv)


async def _save(shop: Workshop, peers: Peers, domain: Domain, size: int) -> Saved:
    """Boot a guest, fill it, and save it all three ways."""
    shop.say(f"a guest of {size} MiB: savevm, migration to a file, virsh save")
    async with peers.booted(peers.own_disk) as peer:
        await peer.practise()
        await peer.exec(["python3", "-c", program(size // 2)])
        began = time.perf_counter()
        await peer.save_inside()
        inside = time.perf_counter()
        await peer.save_to(peers.state)
        done = time.perf_counter()
    async with domain.booted() as guest:
        await guest.practise()
        await guest.exec(["python3", "-c", program(size // 2)])
        begun = time.perf_counter()
        await domain.save()
        saved = time.perf_counter()
    return Saved(
        ram_mib=size,
        savevm_ms=milliseconds(inside - began),
        migrate_ms=milliseconds(done - inside),
        virsh_ms=milliseconds(saved - begun),
        state_bytes=peers.state.stat().st_size,
    )


async def _forks(
    shop: Workshop, tag: str, size: int, depth: int, number: int, *, filled: bool = False
) -> list[Restore]:
    """A fork of `tag` with all in place, with nothing in the page cache, and without its image."""
    engine, rows = shop.engine, []
    await (await engine.fork_one(tag)).kill()
    await (await engine.fork_one(tag)).kill()
    await engine.settle()
    caches = ["warm", "dropped", *(["evicted"] if depth and number < SLOW_ROUNDS else [])]
    for cache in caches:
        if cache == "evicted":
            engine.evict_image(tag)
        if cache != "warm":
            await asyncio.to_thread(forget_files, shop.home)
        await asyncio.to_thread(os.sync)
        began = time.perf_counter()
        async with await engine.fork_one(tag) as sandbox:
            forked = time.perf_counter()
            await sandbox.exec(ECHO, timeout=60)
            done = time.perf_counter()
            stages = " ".join(f"{name}={ms}" for name, ms in sandbox.stages.items())
        rows.append(
            Restore(
                "ratoon",
                size,
                depth,
                filled,
                cache,
                number,
                milliseconds(done - began),
                milliseconds(forked - began),
                stages,
            )
        )
    return rows


async def _peers(peers: Peers, domain: Domain, size: int, number: int) -> list[Restore]:
    rows = []
    ways: dict[str, Callable[[], AbstractAsyncContextManager[Guest]]] = {
        "loadvm": peers.loaded,
        "migrate": peers.migrated,
        "virsh": domain.restored,
        "boot": lambda: peers.booted(peers.directory / "booted.qcow2"),
    }
    for way, start in ways.items():
        if way == "virsh":
            await asyncio.to_thread(domain.make_ready)
        if way != "boot":  # as before the forks: what it reads is in the page cache then
            async with start() as peer:
                await peer.exec(ECHO)
        for cache in ("warm", "dropped"):
            if number >= SLOW_ROUNDS and (cache == "dropped" or way == "boot"):
                continue
            if way == "virsh":
                await asyncio.to_thread(domain.make_ready)
            if cache == "dropped":
                if way == "boot":
                    continue
                await asyncio.to_thread(forget_files, peers.directory)
            await asyncio.to_thread(os.sync)
            began = time.perf_counter()
            async with start() as peer:
                ready = time.perf_counter()
                await peer.exec(ECHO)
                done = time.perf_counter()
            rows.append(
                Restore(
                    way,
                    size,
                    0,
                    way != "boot",
                    cache,
                    number,
                    milliseconds(done - began),
                    milliseconds(ready - began),
                    "",
                )
            )
    with suppress(FileNotFoundError):
        (peers.directory / "booted.qcow2").unlink()
    return rows


def _times(rows: Sequence[Restore], way: str, ram: int, cache: str, **more: object) -> list[float]:
    wanted = {"way": way, "ram_mib": ram, "cache": cache, **more}
    return [
        row.first_output_ms
        for row in rows
        if all(getattr(row, name) == value for name, value in wanted.items())
    ]


def _sizes(rows: Sequence[Restore]) -> list[int]:
    return sorted({row.ram_mib for row in rows if row.way == "loadvm"})


def tables(samples: Samples) -> Sequence[Table]:
    rows = samples["restore"]
    return [_peers_table(rows), _depths(rows), _stages(rows), _saves(samples["restore-saves"])]


def _peers_table(rows: Sequence[Restore]) -> Table:
    cells = []
    for ram in _sizes(rows):
        for way, name in WAYS.items():
            filled = way != "boot"
            warm = _times(rows, way, ram, "warm", filled=filled)
            ours = median(_times(rows, "ratoon", ram, "warm", filled=True))
            found = [_times(rows, way, ram, cache, filled=filled) for cache in CACHES]
            cells.append(
                (
                    f"{ram}",
                    name,
                    f"{len(warm)}",
                    *(spread(times, 0) if times else "" for times in found),
                    f"{median(warm) / ours:.1f}",
                )
            )
    columns = ("RAM MiB", "way", "n", *CACHES.values(), "warm, ÷ Ratoon")
    title = "Until the first output, half of the RAM in use, ms; median (least…most)"
    return Table(title, columns, tuple(cells), ("restore",), 2)


def _depths(rows: Sequence[Restore]) -> Table:
    cells = []
    for depth in sorted({row.depth for row in rows if row.way == "ratoon" and not row.filled}):
        found = [_times(rows, "ratoon", 512, cache, depth=depth, filled=False) for cache in CACHES]
        cells.append((f"{depth}", *(spread(times) if times else "" for times in found)))
    title = "Forks of a 512 MiB guest until the first output, by depth, ms"
    return Table(title, ("depth", *CACHES.values()), tuple(cells), ("restore",))


def _stages(rows: Sequence[Restore]) -> Table:
    cells = []
    names: dict[str, None] = {}
    found = []
    for ram in _sizes(rows):
        for cache in CACHES:
            of_case = [
                row
                for row in rows
                if (row.way, row.ram_mib, row.cache, row.filled) == ("ratoon", ram, cache, True)
            ]
            parsed = [dict(pair.split("=") for pair in row.stages.split()) for row in of_case]
            first_exec = [row.first_output_ms - row.ready_ms for row in of_case]
            found.append((ram, cache, parsed, first_exec))
            names.update(dict.fromkeys(name for stages in parsed for name in stages))
    for ram, cache, parsed, first_exec in found:
        if not parsed:
            continue
        medians = (median(float(each.get(name, 0)) for each in parsed) for name in names)
        last = f"{median(first_exec):.1f}"
        cells.append((f"{ram}", CACHES[cache], *(f"{ms:.1f}" for ms in medians), last))
    columns = ("RAM MiB", "cache", *names, "echo")
    return Table("Stages of Ratoon's forks, median ms", columns, tuple(cells), ("restore",), 2)


def _saves(rows: Sequence[Saved]) -> Table:
    cells = tuple(
        (
            f"{row.ram_mib}",
            f"{row.savevm_ms:,.0f}",
            f"{row.migrate_ms:,.0f}",
            f"{row.virsh_ms:,.0f}",
            f"{row.state_bytes / MIB:,.0f}",
        )
        for row in rows
    )
    columns = ("RAM MiB", "savevm ms", "migrate ms", "virsh save ms", "file MiB")
    return Table("What it took to save it the peers' ways", columns, cells, ("restore-saves",))


def targets(samples: Samples) -> Sequence[Target]:
    rows = samples["restore"]
    sizes = _sizes(rows)
    ours = {ram: median(_times(rows, "ratoon", ram, "warm", filled=True)) for ram in sizes}
    theirs = {ram: median(_times(rows, "loadvm", ram, "warm")) for ram in sizes}
    ratios = {ram: theirs[ram] / ours[ram] for ram in sizes}
    least, most = sizes[0], sizes[-1]
    found = [
        Target(f"loadvm / our restore, {least} MiB", ratios[least], "≥", 3, "restore"),
        Target(
            f"our restore, {most} MiB / {least} MiB", ours[most] / ours[least], "≤", 1.15, "restore"
        ),
    ]
    found += [
        Target(
            f"loadvm / our restore, {ram} MiB, to that with half the RAM",
            ratios[ram] / ratios[before],
            "≥",
            1,
            "restore",
        )
        for before, ram in pairwise(sizes)
    ]
    return found


def plots(samples: Samples) -> Sequence[Plot]:
    rows = samples["restore"]
    drawn = []
    for way, cache in (
        *(("ratoon", "warm"), ("ratoon", "dropped"), ("loadvm", "warm")),
        *(("loadvm", "dropped"), ("migrate", "warm"), ("virsh", "warm"), ("boot", "warm")),
    ):
        points = (
            (f"{ram}", tuple(_times(rows, way, ram, cache, filled=way != "boot")))
            for ram in _sizes(rows)
        )
        name = f"{way}{', cache dropped' if cache == 'dropped' else ''}"
        drawn.append(Series(name, tuple((x, times) for x, times in points if times)))
    title = "From a snapshot to the first output, half of the RAM in use"
    return [Plot("restore", title, "RAM, MiB", "ms (log)", tuple(drawn), log=True)]


BENCH = Bench(
    name="restore",
    title="Until the first output",
    iterations=6,
    rows={"restore": Restore, "restore-saves": Saved},
    measure=measure,
    tables=tables,
    targets=targets,
    plots=plots,
)
