"""What a database asks of a volume: many files made and synced, for as few calls as can be."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from vm_helpers import sh

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.volumes import named, nfs
from ratoon.machine.volumes.rpc import Call

FILES = 20
#: As a database does: made, written, synced; then opened again and again.
MAKE = f"""
import os
os.mkdir("/data/many")
for number in range({FILES}):
    fd = os.open(f"/data/many/{{number}}", os.O_RDWR | os.O_CREAT)
    os.write(fd, bytes(8192))
    os.fsync(fd)
    os.close(fd)
"""
OPEN = f"""
import os
for number in range({FILES}):
    for _ in range(10):
        fd = os.open(f"/data/many/{{number}}", os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
"""


@pytest.fixture(scope="module")
async def sandbox(engine: Engine) -> AsyncIterator[Sandbox]:
    """It has a volume that nobody else writes to."""
    options = SandboxOptions(volumes=(Volume(source="data", target="/data"),))
    async with await engine.fork_one("base", options) as sandbox:
        yield sandbox


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What the guest's kernel asks its server, by name."""
    counted: Counter[str] = Counter()
    answer = nfs.Nfs.__call__

    def count(self: nfs.Nfs, call: Call) -> bytes:
        counted[nfs._NAMES[call.procedure]] += 1
        return answer(self, call)

    monkeypatch.setattr(nfs.Nfs, "__call__", count)
    return counted


async def test_calls_for_files_that_are_made_and_synced(
    sandbox: Sandbox, calls: Counter[str]
) -> None:
    await sandbox.exec(["python3", "-c", "import os"])
    calls.clear()
    result = await sandbox.exec(["python3", "-c", MAKE])
    assert result.exit_code == 0, result
    # Whether there is one of that name, to make it, and what is in it, on the host's disk.
    assert calls["lookup"] <= FILES + 2
    assert (calls["create"], calls["write"], calls["commit"]) == (FILES, FILES, 0), calls
    # As much as a slow host makes attributes too old: they are of the directories.
    assert calls.total() <= 3 * FILES + 20, calls

    calls.clear()
    result = await sandbox.exec(["python3", "-c", OPEN])
    assert result.exit_code == 0, result
    # Whether the user may, once; not whether it has changed, each time.
    assert calls["access"] <= FILES + 2
    assert calls["getattr"] + calls["lookup"] <= 3 * FILES, calls


async def test_what_the_host_changes_is_seen_soon(engine: Engine, sandbox: Sandbox) -> None:
    directory = named.directory(engine.store.home) / "data"
    await sh(sandbox, "echo of the guest >/data/file; cat /data/file")
    (directory / "file").write_text("of the host\n")
    await sh(sandbox, "until grep host /data/file; do sleep 0.1; done")


async def test_after_a_reset_a_volume_is_what_it_is(
    engine: Engine, sandbox: Sandbox, calls: Counter[str]
) -> None:
    """The guest's kernel believes nothing of what it knew when the snapshot was taken."""
    await sh(sandbox, "echo before >/data/file; cat /data/file; ! cat /data/new 2>/dev/null")
    await engine.branch(sandbox, "before")
    await sh(sandbox, "echo after >/data/file; echo new >/data/new; ls /data")
    calls.clear()
    await engine.reset(sandbox)
    # It was mounted anew. On a slow host all that is known is too old anyway.
    assert calls["fsinfo"]
    assert await sh(sandbox, "cat /data/file /data/new") == "after\nnew\n"
    # Where somebody uses it, it is the same soon.
    await sh(sandbox, "cd /data; sleep 1000 </dev/null >/dev/null 2>&1 & cat /data/file")
    await engine.branch(sandbox, "used")
    await sh(sandbox, "echo later >/data/file")
    calls.clear()
    await engine.reset(sandbox)
    assert not calls["fsinfo"]
    await sh(sandbox, "until grep later /data/file; do sleep 0.1; done; echo more >>/data/file")
    directory = named.directory(engine.store.home) / "data"
    assert await asyncio.to_thread((directory / "file").read_text) == "later\nmore\n"
