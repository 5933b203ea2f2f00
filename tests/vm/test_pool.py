"""The pool: machines that wait, and forks that need no start."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
from vm_helpers import leaves_nothing, sh

from ratoon.api.answers import PoolInfo
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import InvalidInput, RatoonError


@pytest.fixture
async def stock(engine: Engine) -> AsyncIterator[Engine]:
    """Two machines wait for `pooled`, which has something of its own."""
    async with await engine.fork_one("base") as maker:
        await sh(maker, "touch /root/pooled")
        await engine.branch(maker, "pooled")
    with leaves_nothing(engine):
        await engine.pool.keep(engine.store.get("pooled"), 2)
        await engine.pool.filled()
        yield engine
        await engine.pool.close()


def status(engine: Engine) -> PoolInfo:
    (status,) = engine.pool.status()
    return status


def waiting(engine: Engine) -> list[int]:
    """The processes that wait."""
    (stock,) = engine.pool._stocks.values()
    return [each.prepared.machine.pid for each in stock.ready]


async def test_a_fork_takes_what_waits_and_it_is_replaced(stock: Engine) -> None:
    assert (status(stock).tag, status(stock).wanted, status(stock).ready) == ("pooled", 2, 2)
    assert status(stock).private_bytes > 2 * 4_000_000
    ready = waiting(stock)
    async with await stock.fork_one("pooled") as fork:
        assert "start" not in fork.stages
        assert fork.pid == ready[0]
        await stock.pool.filled()
        assert status(stock).ready == 2
        assert ready[1] in waiting(stock)
        assert fork.pid not in waiting(stock)
        await sh(fork, f"ls /root/pooled; test $(hostname) = {fork.id}")


async def test_more_than_wait(stock: Engine) -> None:
    forks = await stock.fork("pooled", 4)
    names = set()
    for fork in forks:
        assert isinstance(fork, Sandbox)
        names.add(
            await sh(fork, "ls /root/pooled; cat /etc/machine-id /proc/sys/kernel/random/uuid")
        )
    assert len(names) == 4
    assert sum("start" not in each.stages for each in forks if isinstance(each, Sandbox)) >= 2
    await asyncio.gather(*(fork.kill() for fork in forks if isinstance(fork, Sandbox)))


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "this moment"])
async def test_a_machine_that_was_killed_is_not_handed_out(stock: Engine, noticed: bool) -> None:
    doomed = waiting(stock)
    for pid in doomed:
        os.kill(pid, signal.SIGKILL)
    while noticed and status(stock).ready:
        await asyncio.sleep(0.01)
    async with await stock.fork_one("pooled") as fork:
        assert fork.pid not in doomed
        await sh(fork, "ls /root/pooled")
    await stock.pool.filled()
    assert status(stock).ready == 2


async def test_another_snapshot_of_the_same_tag(stock: Engine) -> None:
    async with await stock.fork_one("base") as maker:
        await stock.delete("pooled")
        assert stock.pool.status() == ()
        await sh(maker, "touch /root/anew")
        await stock.branch(maker, "pooled")
    async with await stock.fork_one("pooled") as fork:
        assert "start" in fork.stages
        await sh(fork, "ls /root/anew; ! ls /root/pooled")


async def test_another_process_replaced_the_snapshot(stock: Engine) -> None:
    async with await stock.fork_one("base") as maker:
        stock.store.delete("pooled")  # as another process does: this one's pool is not told
        await sh(maker, "touch /root/anew")
        await stock.branch(maker, "pooled")
    async with await stock.fork_one("pooled") as fork:
        await sh(fork, "ls /root/anew; ! ls /root/pooled")


async def test_other_numbers(stock: Engine) -> None:
    pooled = stock.store.get("pooled")
    for wrong in (-1, 1001):
        with pytest.raises(InvalidInput, match="use 0 to 1000"):
            await stock.pool.keep(pooled, wrong)
    await stock.pool.keep(pooled, 1)
    await stock.pool.filled()
    assert status(stock).ready == len(waiting(stock)) == 1
    await stock.pool.keep(pooled, 0)
    assert stock.pool.status() == ()


async def test_asked_at_once_and_dropped_at_once(stock: Engine) -> None:
    pooled = stock.store.get("pooled")
    await asyncio.gather(*(stock.pool.keep(pooled, 1) for _ in range(3)))
    await stock.pool.filled()
    assert status(stock).ready == 1
    await asyncio.gather(stock.pool.drop("pooled"), stock.pool.drop("pooled"), stock.pool.close())
    assert stock.pool.status() == ()


async def test_what_cannot_be_started_is_tried_again(
    stock: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*arguments: object) -> None:
        raise RatoonError("no more of them")

    with monkeypatch.context() as patch:
        patch.setattr(stock.pool, "_reserve", fail)
        async with await stock.fork_one("pooled"):
            await stock.pool.filled()
            assert "the pool of pooled is not full: no more of them" in caplog.text
            assert status(stock).ready == 1
    async with await stock.fork_one("pooled") as fork:
        await stock.pool.filled()
        assert status(stock).ready == 2
        assert "start" not in fork.stages
