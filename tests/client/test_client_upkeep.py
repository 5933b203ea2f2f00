"""Pruning and compressing through both libraries, on an engine in this process; no machine runs."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from both_libraries import Libraries
from ratoon.errors import InvalidInput, NotFound
from ratoon.store.memory.compressed import is_compressed
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.usage import usage
from small_snapshots import Layer, make_image, publish


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """base, on it a, b, c, d, in this order, with an image of each; a1 on a; all of them new."""
    monkeypatch.setenv("RATOON_RUNTIME", str(tmp_path / "run"))
    store = Store.open(tmp_path / "home")

    def make(tag: str, layer: Layer, parent: Snapshot | None = None) -> Snapshot:
        return publish(store, tag, layer, parent, created_at_unix=time.time())

    base = make("base", dict.fromkeys(range(200), 1))
    branches = {
        tag: make(tag, dict.fromkeys(range(n + 20), n + 2), base) for n, tag in enumerate("abcd")
    }
    make("a1", {}, branches["a"])
    for snapshot in branches.values():
        make_image(store, snapshot)
    yield store
    assert not (tmp_path / "run").exists()


@pytest.fixture(params=["asyncio", "threads"])
def library(request: pytest.FixtureRequest) -> Libraries:
    return Libraries(request.param)


@pytest.fixture
async def client(library: Libraries, store: Store) -> AsyncIterator[Any]:
    async with library.AsyncClient.embedded(store.home) as client:
        yield client


def tags(store: Store) -> set[str]:
    return {path.name for path in store.snapshots.iterdir()}


async def test_what_no_rule_keeps_is_deleted_and_its_bytes_are_free(
    client: Any, store: Store
) -> None:
    before = usage(store).total
    planned = await client.snapshots.prune(keep_last=2, keep=["b"], dry_run=True)
    assert planned.dry_run
    assert [each.tag for each in planned.snapshots if not each.keep] == ["c"]
    assert tags(store) == {"base", "a", "a1", "b", "c", "d"}
    assert usage(store).total == before
    done = await client.snapshots.prune(keep_last=2, keep=["b"])
    assert [each.tag for each in done.snapshots if each.deleted] == ["c"]
    assert tags(store) == {"base", "a", "a1", "b", "d"}
    assert before - usage(store).total == done.freed_bytes == planned.freed_bytes > 0
    reasons = {each.tag: each.reason for each in done.snapshots}
    assert reasons["a"] == "a1 was made from it"
    assert reasons["b"] == "kept as b"
    (lineage,) = done.lineages
    assert lineage.lineage == "base"
    assert lineage.bytes_before > lineage.bytes_after > 0


async def test_a_budget(client: Any, store: Store) -> None:
    done = await client.snapshots.prune(max_bytes=0, lineage="b")
    assert [each.tag for each in done.snapshots if each.deleted] == ["b", "c", "d"]
    (lineage,) = done.lineages
    assert lineage.excess_bytes == lineage.bytes_after
    assert tags(store) == {"base", "a", "a1"}, "the newest, and what it was made from"
    assert not (await client.snapshots.prune(keep_within=3600)).freed_bytes


async def test_who_needs_a_snapshot(client: Any, store: Store) -> None:
    await client.pool()  # an engine that starts removes sandboxes that nobody holds
    parent = store.sandboxes / "sb-1-1" / "parent"
    parent.parent.mkdir(mode=0o700)
    link_snapshot(store.get("b"), parent)
    workspaces = store.home / "workspaces"
    workspaces.mkdir(mode=0o700)
    record = {"id": "ws-1", "name": "w", "source_tag": "c", "created_at_unix": 1, "options": {}}
    record |= {"last_active_unix": 1, "state_tag": "d"}
    (workspaces / "w.json").write_text(json.dumps(record))
    done = await client.snapshots.prune(keep_within=0)
    reasons = {each.tag: each.reason for each in done.snapshots}
    assert reasons["b"] == "used by sandbox sb-1-1"
    assert reasons["c"] == reasons["d"] == "used by workspace w"
    assert tags(store) == {"base", "b", "c", "d"}


async def test_rules_that_make_no_sense_delete_nothing(client: Any, store: Store) -> None:
    with pytest.raises(InvalidInput, match="say what to keep"):
        await client.snapshots.prune()
    with pytest.raises(NotFound, match="absent"):
        await client.snapshots.prune(keep_last=1, keep=["absent"])
    with pytest.raises(InvalidInput):
        await client.snapshots.prune(keep_last=0)
    assert len(tags(store)) == 6


async def test_layers_are_compressed_and_plain_again(client: Any, store: Store) -> None:
    before = usage(store).total
    report = await client.snapshots.compress("a", level=1)
    assert {each.tag: each.outcome for each in report.layers}["base"] == "compressed"
    assert is_compressed(store.get("d").memory_path(0), label="L")
    assert not is_compressed(store.get("d").memory_path(1), label="L")
    saved = sum(each.bytes_before - each.bytes_after for each in report.layers if each.names)
    assert before - usage(store).total == saved
    assert (await client.snapshots.compress("a", undo=True)).layers
    assert usage(store).total == before
    with pytest.raises(NotFound):
        await client.snapshots.compress("absent")
    with pytest.raises(InvalidInput):
        await client.snapshots.compress(level=20)
