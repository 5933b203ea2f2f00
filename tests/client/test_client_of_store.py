"""Both libraries, on an engine in this process whose store has small snapshots. No machine runs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from both_libraries import Libraries
from ratoon.errors import (
    AlreadyExists,
    Corrupt,
    HasDependents,
    HostError,
    InvalidInput,
    NotFound,
    RatoonError,
)
from ratoon.store.snapshot.store import Store
from small_snapshots import publish


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store that has base, L1 on it, and L2 on that; afterwards nothing else may be left."""
    monkeypatch.setenv("RATOON_RUNTIME", str(tmp_path / "run"))
    store = Store.open(tmp_path / "home")
    publish(store, "L2", parent=publish(store, "L1", parent=publish(store, "base")))
    yield store.home
    assert not (tmp_path / "run").exists()


@pytest.fixture(params=["asyncio", "threads"])
def library(request: pytest.FixtureRequest) -> Libraries:
    return Libraries(request.param)


@pytest.fixture
async def client(library: Libraries, home: Path) -> AsyncIterator[Any]:
    async with library.AsyncClient.embedded(home) as client:
        yield client


async def test_snapshots_are_told_of(client: Any) -> None:
    assert [each.tag for each in await client.snapshots.list()] == ["L1", "L2", "base"]
    assert (await client.snapshots.get("L1")).parent_tag == "base"
    detail = await client.snapshots.info("L2")
    assert (detail.ancestors, detail.chain_depth) == (["base", "L1"], 2)
    lineage = await client.snapshots.lineage()
    assert [(each.tag, each.level) for each in lineage] == [("base", 0), ("L1", 1), ("L2", 2)]


async def test_deleting(client: Any) -> None:
    with pytest.raises(HasDependents, match="--cascade") as refused:
        await client.snapshots.delete("L1")
    assert refused.value.dependents == ["L2"]
    assert refused.value.answered == 409
    async with client.events() as events:
        await client.snapshots.delete("L1", cascade=True)
        told = [await anext(aiter(events)) for _ in range(2)]
    assert [(each.kind, each.snapshot) for each in told] == [
        ("snapshot_deleted", "L2"),
        ("snapshot_deleted", "L1"),
    ]
    assert [each.tag for each in await client.snapshots.list()] == ["base"]


async def test_errors_are_what_they_are_without_a_daemon(client: Any, home: Path) -> None:
    snapshots = client.snapshots
    for tag in ("absent", "..", "a/b", "ä"):
        with pytest.raises(NotFound):
            await snapshots.get(tag)
    with pytest.raises(AlreadyExists):
        await snapshots.compact("L1", "base")
    with pytest.raises(InvalidInput):
        await snapshots.compact("L1", "a/b")
    with pytest.raises(InvalidInput, match="ram_mib"):
        await snapshots.from_image("debian", "new", ram_mib=1)
    (home / "snapshots/L1/manifest.json").write_text("{}")
    with pytest.raises(Corrupt, match="L1"):
        await snapshots.get("L1")
    assert [each.status for each in await snapshots.list()] == ["failed", "ready", "ready"]


async def test_there_are_no_sandboxes(client: Any, library: Libraries) -> None:
    assert await client.sandboxes(metadata={"a": "b"}, state="running") == []
    for name in ("sb-00000000-0000", "..", "", "a/../b"):
        with pytest.raises(RatoonError):
            await library.AsyncSandbox.connect(name, client=client)
    with pytest.raises(NotFound, match="absent"):
        await library.AsyncSandbox.create("absent", client=client)
    assert await client.pool() == []


async def test_the_environment_says_where(
    library: Libraries, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATOON_HOME", str(home))
    async with library.AsyncClient.embedded() as client:
        assert await client.pool() == []
        (socket,) = (home.parent / "run").iterdir()
        assert socket.stat().st_mode & 0o777 == 0o600
        monkeypatch.setenv("RATOON_URL", f"unix://{socket}")
        assert await library.AsyncSandbox.list() == []
        async with library.AsyncClient() as other:
            assert await other.version() == await client.version()


async def test_an_engine_that_cannot_start_says_why(library: Libraries, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with library.AsyncClient.embedded(tmp_path / "file") as client:
        with pytest.raises((HostError, NotADirectoryError, FileExistsError)):
            await client.version()
