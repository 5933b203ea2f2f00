"""A branch while commands talk: the source loses no byte, a fork begins with a clean channel."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from hashlib import sha256

import pytest
from vm_helpers import sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.guest import commands
from ratoon.machine.guest.commands import ExecResult
from ratoon.units import MIB

TAGS = ("early", "later", "last")


@pytest.fixture
async def source(engine: Engine) -> AsyncIterator[Sandbox]:
    async with await engine.fork_one("base") as sandbox:
        yield sandbox


async def branch_during(engine: Engine, source: Sandbox, command: asyncio.Task[ExecResult]) -> None:
    for tag in TAGS:
        await asyncio.sleep(0.1)
        await engine.branch(source, tag)
    assert not command.done(), "it ended before the branches did"


async def assert_forks_speak_for_themselves(engine: Engine) -> None:
    for tag in TAGS:
        async with await engine.fork_one(tag) as fork:
            result = await fork.exec(["sh", "-c", f"echo {tag}; cat; echo err >&2"], stdin=b"own")
            assert (result.stdout, result.stderr) == (f"{tag}\nown".encode(), b"err\n")
            assert result.exit_code == 0


async def test_output(engine: Engine, source: Sandbox) -> None:
    lines = 4_000_000
    command = asyncio.create_task(source.exec(["seq", str(lines)]))
    await branch_during(engine, source, command)
    result = await command
    expected = sha256(b"".join(b"%d\n" % n for n in range(1, lines + 1)))
    assert sha256(result.stdout).digest() == expected.digest()
    await assert_forks_speak_for_themselves(engine)


async def count(source: Sandbox, enough: asyncio.Event) -> int:
    """Have the guest count, and check each line of it until that is enough; the last number."""
    async with commands.start(source, ["seq", str(10**12)]) as command:
        last, rest = 0, b""
        while not enough.is_set():
            piece = await command.read()
            assert piece is not None
            lines, newline, rest = (rest + piece[1]).rpartition(b"\n")
            first, last = last + 1, last + lines.count(b"\n") + len(newline)
            assert lines + newline == b"".join(b"%d\n" % n for n in range(first, last + 1))
        return last


async def test_many_branches_lose_no_byte(engine: Engine, source: Sandbox, soak: bool) -> None:
    enough = asyncio.Event()
    counting = asyncio.create_task(count(source, enough))
    for number in range(100 if soak else 10):
        await engine.branch(source, f"many{number}")
        assert not counting.done(), counting.result()
    enough.set()
    assert await counting > 100_000
    async with await engine.fork_one(f"many{number}") as fork:
        assert await sh(fork, "echo whole") == "whole\n"


async def test_input(engine: Engine, source: Sandbox) -> None:
    data = os.urandom(16 * MIB)
    command = asyncio.create_task(source.exec(["sha256sum"], stdin=data))
    await branch_during(engine, source, command)
    assert (await command).stdout.split()[0] == sha256(data).hexdigest().encode()
    await assert_forks_speak_for_themselves(engine)


async def test_input_and_output_at_once(engine: Engine, source: Sandbox) -> None:
    data = os.urandom(12 * MIB)
    command = asyncio.create_task(source.exec(["cat"], stdin=data))
    await branch_during(engine, source, command)
    assert (await command).stdout == data
    await assert_forks_speak_for_themselves(engine)


async def test_a_flood_that_nobody_hears_in_the_fork_runs_on(
    engine: Engine, source: Sandbox
) -> None:
    """Its output is drained: a process that was writing at the branch is not stuck in the fork."""
    script = "while :; do printf %01000d 0; echo >>/dev/shm/count; done"
    command = asyncio.create_task(source.exec(["sh", "-c", script]))
    await asyncio.sleep(0.3)
    await engine.branch(source, TAGS[0])
    command.cancel()
    async with await engine.fork_one(TAGS[0]) as fork:
        written = int(await sh(fork, "wc -l </dev/shm/count"))
        more = written + 200  # KB, while a pipe holds 64
        await sh(fork, f"until [ $(wc -l </dev/shm/count) -gt {more} ]; do sleep 0.1; done")
