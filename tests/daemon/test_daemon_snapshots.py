"""Snapshots over HTTP: shown, deleted, compacted, related."""

from __future__ import annotations

import asyncio
import threading

import httpx2
import pytest

from ratoon.engine.sandbox.engine import Engine
from ratoon.store.snapshot.store import Store

pytest_plugins = ["app_fixtures"]


async def test_the_list_has_what_is_known_and_leaves_out_what_is_not(
    api: httpx2.AsyncClient, bare_engine: Engine
) -> None:
    listed = {each["tag"]: each for each in (await api.get("/v1/snapshots")).json()}
    assert sorted(listed) == ["L1", "L2", "base"]
    expected = {
        "tag": "base",
        "dir": str(bare_engine.store.snapshots / "base"),
        "created_at_unix": 1_700_000_000,
        "status": "ready",
        "bootable": True,
        "pause_ms": 4.25,
    }
    assert expected.items() <= listed["base"].items()
    assert not {"warning", "parent_tag", "branched_from", "diff_ms", "error"} & set(listed["base"])
    assert listed["L2"]["parent_tag"] == "L1"
    assert listed["L2"]["diff_physical_bytes"] > 0


async def test_a_damaged_snapshot_does_not_hide_the_others(
    own_api: httpx2.AsyncClient, own_engine: Engine
) -> None:
    (own_engine.store.snapshots / "L1/manifest.json").write_text("{}")
    listed = {each["tag"]: each for each in (await own_api.get("/v1/snapshots")).json()}
    assert listed["base"]["bootable"]
    assert (listed["L1"]["status"], listed["L1"]["bootable"]) == ("failed", False)
    assert "manifest.json" in listed["L1"]["error"]
    fork = await own_api.post("/v1/sandboxes", json={"snapshot_tag": "L1"})
    assert fork.status_code == 409
    assert "manifest.json" in fork.json()["error"]


async def test_info_is_all_about_one(api: httpx2.AsyncClient) -> None:
    base = (await api.get("/v1/snapshots/base/info")).json()
    assert "parent_tag" not in base
    assert (base["chain_depth"], base["ancestors"], base["dependents"]) == (0, [], ["L1"])
    top = (await api.get("/v1/snapshots/L2/info")).json()
    assert top["parent_content_hash"].startswith("blake3:")
    assert (top["chain_depth"], top["ancestors"]) == (2, ["base", "L1"])
    assert (await api.get("/v1/snapshots/absent/info")).status_code == 404


async def test_deleting(own_api: httpx2.AsyncClient) -> None:
    refused = await own_api.delete("/v1/snapshots/base")
    assert refused.status_code == 409
    assert "L1" in refused.json()["error"]
    assert "L2" not in refused.json()["error"]
    both = await own_api.delete("/v1/snapshots/base?cascade=true&force=true")
    assert both.status_code == 400
    assert (await own_api.delete("/v1/snapshots/base?force")).status_code == 204
    assert (await own_api.delete("/v1/snapshots/base")).status_code == 404
    gone = await own_api.delete("/v1/snapshots/L1?cascade=true")
    assert (gone.status_code, gone.content) == (204, b"")
    assert (await own_api.get("/v1/snapshots")).json() == []


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("base/compact", {"to": "base"}, 400),
        ("base/compact", {"to": "no/tag"}, 400),
        ("base/compact", {"to": "L1"}, 409),
        ("absent/compact", {"to": "new"}, 404),
        ("base/compact", {}, 422),
    ],
)
async def test_compacting_is_refused(
    api: httpx2.AsyncClient, path: str, body: dict[str, str], status: int
) -> None:
    assert (await api.post(f"/v1/snapshots/{path}", json=body)).status_code == status


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"tag": "base", "image": "debian"}, 400),
        ({"tag": "new", "image": "debian:potato"}, 404),
        ({"tag": "new", "image": "debian", "ram_mib": 1}, 400),
        ({"tag": "new"}, 422),
        ({"tag": "new", "kernel": "/etc/hostname"}, 422),
        ({"tag": "new", "kernel": "/etc/hostname", "rootfs": "/etc/hostname"}, 400),
        ({"tag": "new", "image": "debian", "kernel": "/x", "rootfs": "/y"}, 400),
        ({"tag": "new", "image": "debian", "boot_wait_secs": 61}, 400),
        ({"tag": "new", "image": "debian", "boot_wait_secs": "1"}, 422),
        ({"tag": "new", "image": "debian", "network": "wild"}, 400),
    ],
)
async def test_making_a_base_is_refused(
    api: httpx2.AsyncClient, body: dict[str, object], status: int
) -> None:
    answer = await api.post("/v1/snapshots", json=body)
    assert answer.status_code == status


async def test_lineage_and_usage(api: httpx2.AsyncClient) -> None:
    nodes = (await api.get("/v1/lineage")).json()
    assert [(node["tag"], node["level"]) for node in nodes] == [("base", 0), ("L1", 1), ("L2", 2)]
    usage = (await api.get("/v1/usage")).json()
    assert sorted(usage["snapshots"]) == ["L1", "L2", "base"]
    one = (await api.get("/v1/snapshots/L2/usage")).json()
    assert one == usage["snapshots"]["L2"]


async def test_check_tells_what_is_damaged(own_api: httpx2.AsyncClient, own_engine: Engine) -> None:
    (own_engine.store.snapshots / "L2/vmstate").write_bytes(b"other")
    report = (await own_api.post("/v1/check")).json()
    assert not report["sound"]
    assert any(found["snapshot"] == "L2" for found in report["findings"])
    for body, status in (({"subset": "1/2"}, 400), ({"read_data": True, "subset": "x"}, 400)):
        assert (await own_api.post("/v1/check", json=body)).status_code == status


async def test_there_is_no_pool_of_what_is_not_there(api: httpx2.AsyncClient) -> None:
    assert (await api.get("/v1/pool")).json() == []
    assert (await api.put("/v1/pool/absent", json={"size": 1})).status_code == 404
    assert (await api.put("/v1/pool/base", json={"size": 1001})).status_code == 400


async def test_a_deletion_holds_up_nobody(
    own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is done on the event loop: the manifests of a store may be many."""
    go_on, delete, image_roots = threading.Event(), Store.delete, Store.image_roots

    def waiting(store: Store, tag: str, **how: bool) -> tuple[str, ...]:
        assert go_on.wait(300), "the event loop stands still"
        return delete(store, tag, **how)

    def reading(store: Store) -> set[str]:
        assert threading.current_thread() is not threading.main_thread()
        return image_roots(store)

    monkeypatch.setattr(Store, "delete", waiting)
    monkeypatch.setattr(Store, "image_roots", reading)
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    assert await own_engine.delete("L2") == ("L2",)


async def test_a_deletion_that_nobody_waits_for_is_told_all_the_same(
    own_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on, delete = threading.Event(), threading.Event(), Store.delete

    def waiting(store: Store, tag: str, **how: bool) -> tuple[str, ...]:
        begun.set()
        assert go_on.wait(300)
        return delete(store, tag, **how)

    told: list[str | None] = []
    monkeypatch.setattr(Store, "delete", waiting)
    monkeypatch.setattr(own_engine.events, "tell", lambda kind, snapshot: told.append(snapshot))
    deleting = asyncio.create_task(own_engine.delete("L1", cascade=True))
    await asyncio.to_thread(begun.wait, 60)
    deleting.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await deleting
    assert told == ["L2", "L1"]
