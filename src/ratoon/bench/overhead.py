"""What HTTP adds to a fork: from a client to the daemon's unix socket and back.

::

    python -m ratoon.bench.overhead [--rounds N] [--csv FILE]

Forks by the engine itself and over HTTP take turns in one process, so that both meet the same
machine. Of each, what it takes beyond the fork's own time (`fork_ms`) is compared too: that differs
less from one fork to the next.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx2
from rich.console import Console
from rich.table import Table

from ratoon.bench.machine import describe_machine
from ratoon.bench.samples import percentile, write_rows
from ratoon.daemon.app import create_app
from ratoon.daemon.serve import Server
from ratoon.daemon.settings import Settings
from ratoon.daemon.sockets import unix_socket
from ratoon.sandbox.engine import Engine
from ratoon.sandbox.sandbox import Sandbox

ROUNDS = 100


@dataclass(frozen=True)
class Fork:
    """One fork, in ms: as its caller saw it, and the engine's own account of it."""

    how: str
    round: int
    seen_ms: float
    fork_ms: float

    @property
    def beyond_ms(self) -> float:
        return self.seen_ms - self.fork_ms


async def measure(engine: Engine, api: httpx2.AsyncClient, rounds: int) -> list[Fork]:
    """Fork in turns, and kill each sandbox before the next."""
    samples = []
    for number in range(-3, rounds):  # the first few are for warming up
        began = time.perf_counter()
        (made,) = await engine.fork("base", 1)
        seen = (time.perf_counter() - began) * 1e3
        assert isinstance(made, Sandbox), made
        samples.append(Fork("engine", number, seen, made.fork_ms))
        await made.kill()

        began = time.perf_counter()
        answer = await api.post("/v1/sandboxes", json={"snapshot_tag": "base"})
        seen = (time.perf_counter() - began) * 1e3
        (info,) = answer.json()
        samples.append(Fork("HTTP", number, seen, info["fork_ms"]))
        await api.delete(f"/v1/sandboxes/{info['id']}")
    return [sample for sample in samples if sample.round >= 0]


async def run(home: Path, rounds: int) -> list[Fork]:
    async with Engine.open(home) as engine:
        await engine.from_image("debian", "base")
        app = create_app(engine, Settings(audit_log=home / "audit.log"))
        with unix_socket(home / "run" / "daemon.sock") as listener:
            server = Server(app, listener, None)
            async with asyncio.TaskGroup() as group:
                group.create_task(server.run_to_the_end())
                await server.listens.wait()
                transport = httpx2.AsyncHTTPTransport(uds=str(home / "run" / "daemon.sock"))
                async with httpx2.AsyncClient(
                    transport=transport, base_url="http://ratoon", timeout=120
                ) as api:
                    samples = await measure(engine, api, rounds)
                server.stop()
    return samples


def show(console: Console, samples: list[Fork]) -> None:
    """Print what both took, and what HTTP adds."""
    table = Table(box=None, pad_edge=False)
    for name in ("", "n", "fork p50 ms", "p95", "beyond its own time p50 ms", "p95"):
        table.add_column(name, justify="right" if name else "left")
    seen, beyond = {}, {}
    for how in ("engine", "HTTP"):
        of_how = [sample for sample in samples if sample.how == how]
        seen[how] = [sample.seen_ms for sample in of_how]
        beyond[how] = [sample.beyond_ms for sample in of_how]
        figures = (median(seen[how]), percentile(seen[how], 95))
        others = (median(beyond[how]), percentile(beyond[how], 95))
        table.add_row(
            how, str(len(of_how)), *(f"{ms:.1f}" for ms in figures), *(f"{ms:.2f}" for ms in others)
        )
    console.print(table)
    console.print(
        f"HTTP adds {median(beyond['HTTP']) - median(beyond['engine']):.2f} ms (p50); "
        f"{median(seen['HTTP']) - median(seen['engine']):.2f} ms between the medians of the forks",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ratoon.bench.overhead")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--csv", type=Path, help="also write the samples as CSV to this file")
    options = parser.parse_args()
    console = Console()
    console.print(describe_machine())
    with tempfile.TemporaryDirectory(prefix="ratoon-overhead-") as name:
        samples = asyncio.run(run(Path(name), options.rounds))
    show(console, samples)
    if options.csv:
        write_rows(options.csv, samples)


if __name__ == "__main__":
    main()
