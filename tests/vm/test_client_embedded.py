"""The library on an engine in this process, and a client and a daemon that are there by chance."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
from vm_helpers import FOR_EVER, processes_of, until

from both_libraries import Libraries
from ratoon import paths
from ratoon.engine.sandbox.engine import Engine
from ratoon.errors import Unreachable


@pytest.mark.parametrize("kind", ["asyncio", "threads"])
async def test_its_sandboxes_end_with_it(engine: Engine, home: Path, kind: str) -> None:
    library = Libraries(kind)
    before = {*engine.store.sandboxes.iterdir()}
    async with library.AsyncClient.embedded(home) as client:
        sandbox = await library.AsyncSandbox.create("base", client=client)
        assert (await sandbox.commands.run("echo hello")).stdout == "hello\n"
        (fork,) = await sandbox.fork()
        listening = await fork.commands.run(["sleep", "1000"], background=True)
        assert listening.pid
        assert len({*engine.store.sandboxes.iterdir()} - before) == 2
    assert {*engine.store.sandboxes.iterdir()} == before
    assert list(paths.runtime(home).glob("embedded-*")) == []
    with pytest.raises(Unreachable, match="closed"):
        await sandbox.refresh()


FORGETFUL = """
import sys
from ratoon import Client, Sandbox
client = Client.embedded(sys.argv[1])
sandbox = Sandbox.create("base", client=client)
running = sandbox.commands.run(["sleep", "1000"], background=True)
print('here')
"""


async def test_who_forgets_to_close_it_may_end_all_the_same(engine: Engine, home: Path) -> None:
    before = {*engine.store.sandboxes.iterdir()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FORGETFUL, home), stdout=PIPE, stderr=PIPE
    )
    said = await asyncio.wait_for(process.communicate(), FOR_EVER)
    assert (process.returncode, said) == (0, (b"here\n", b""))
    (left,) = {*engine.store.sandboxes.iterdir()} - before
    await until(lambda: not processes_of(left), "its machine to end")
    async with Libraries("asyncio").AsyncClient.embedded(home) as client:
        assert await client.sandboxes() == []
        assert {*engine.store.sandboxes.iterdir()} == before
