"""One store, one engine and one booted base for all tests on real machines.

At the end of the run nothing may be left of it: no process, no directory, no descriptor.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from vm_helpers import control_groups_of, forget, open_files, processes_of, tags

from ratoon import paths
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.machine.vmm.cell import qemu_cell
from ratoon.store.disk.tools import disk_cell
from ratoon.store.memory.compressed import is_compressed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """The store's directory; its sockets are below `paths.runtime(home)`."""
    with tempfile.TemporaryDirectory(prefix="ratoon-vm-") as name:
        home = Path(name) / "home"
        yield home
        runtime = paths.runtime(home)
        left = processes_of(home, runtime), [*runtime.rglob("*")], control_groups_of(runtime.name)
        shutil.rmtree(runtime, ignore_errors=True)
        assert left == ([], [], [])


@pytest.fixture(scope="session")
async def engine(home: Path) -> AsyncIterator[Engine]:
    """An engine whose store has one snapshot: `base`, with 512 MiB of RAM."""
    for cell in (qemu_cell, disk_cell):
        cell()  # this process has it to its end
    files = Counter(open_files())
    async with Engine.open(home) as engine:
        await engine.bases.from_image("debian", "base")
        yield engine
        assert tags(engine) == {"base"}
        assert engine.sandboxes == (), "a test has left a sandbox"
    assert [*engine.store.sandboxes.iterdir(), *engine.store.staging.iterdir()] == []
    assert not list(engine.store.images.glob(".*.tmp"))
    assert sorted((Counter(open_files()) - files).elements()) == []


@pytest.fixture(scope="module")
async def sandbox(engine: Engine) -> AsyncIterator[Sandbox]:
    """A fork of `base` that the tests of one module share."""
    async with await engine.fork_one("base") as sandbox:
        yield sandbox


@pytest.fixture(autouse=True)
async def _clean_store(engine: Engine) -> AsyncIterator[None]:
    """Each test's snapshots go with it, it leaves nothing half made, and `base` as it was."""
    before = tags(engine)
    yield
    await engine.settle()
    for tag in tags(engine) - before:
        forget(engine, tag)
    assert list(engine.store.staging.iterdir()) == []
    assert not is_compressed(engine.store.get("base").memory_path(0), label="base")
