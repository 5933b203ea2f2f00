"""Named volumes over HTTP, and who may have which directory of the host."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from app_client import application

from ratoon.daemon.settings import Settings
from ratoon.engine.sandbox.engine import Engine
from ratoon.machine.volumes.holds import only_ours

pytest_plugins = ["app_fixtures"]

#: As over a unix socket, which has no port, and as over TCP.
UNIX, TCP = "http://ratoon", "http://localhost:8889"


async def test_named_volumes_are_made_listed_and_removed(
    own_api: httpx2.AsyncClient, own_engine: Engine
) -> None:
    assert (await own_api.get("/v1/volumes")).json() == []
    made = await own_api.post("/v1/volumes", json={"name": "cache"})
    assert made.status_code == 201
    path = own_engine.store.home.resolve() / "volumes/cache"
    assert made.json()["path"] == str(path)
    (path / "file").write_bytes(b"x" * 5000)
    assert (await own_api.post("/v1/volumes", json={"name": "cache"})).status_code == 409
    (listed,) = (await own_api.get("/v1/volumes")).json()
    assert (listed["name"], listed["bytes"]) == ("cache", 8192)
    used = (await own_api.get("/v1/usage")).json()["volumes"]["cache"]
    assert used["own_bytes"] == used["total_bytes"] > 8192  # the directory, too
    with only_ours(path):
        held = await own_api.delete("/v1/volumes/cache")
        assert (held.status_code, held.json()["kind"]) == (409, "Conflict")
    assert (await own_api.delete("/v1/volumes/cache")).status_code == 204
    assert (await own_api.delete("/v1/volumes/cache")).status_code == 404
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["..", ".key", "A", "a/b", "-x", "a" * 65, "a\n"])
async def test_what_is_no_name(own_api: httpx2.AsyncClient, own_engine: Engine, name: str) -> None:
    assert (await own_api.post("/v1/volumes", json={"name": name})).status_code in (400, 422)
    assert not (own_engine.store.home / "volumes").exists()


@pytest.mark.parametrize("route", ["/v1/sandboxes", "/v1/runs"])
async def test_over_tcp_only_what_lies_below_a_root(
    bare_engine: Engine, tmp_path: Path, route: str
) -> None:
    (tmp_path / "allowed").mkdir()
    (tmp_path / "other").mkdir()
    settings = Settings(volume_roots=(tmp_path / "allowed",))
    async with application(bare_engine, settings) as client:
        for url, source, refused in (
            (UNIX, tmp_path / "other", False),
            (TCP, tmp_path / "other", True),
            (TCP, tmp_path / "allowed-not", True),
            (TCP, tmp_path / "allowed", False),
            (TCP, tmp_path / "allowed/below", False),
            (TCP, "named", False),
        ):
            volume = {"source": str(source), "target": "/mnt"}
            body = {"snapshot_tag": "missing", "image": "nothing:", "volumes": [volume]}
            answer = await client.post(f"{url}{route}", json=body)
            assert ("--volume-root" in answer.text) == refused, (url, source, answer.text)
            assert answer.status_code == 400 if refused else answer.status_code in (400, 404)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("/", "/mnt"),
        ("/a/../b", "/mnt"),
        ("relative/path", "/mnt"),
        ("Name", "/mnt"),
        ("/a", "mnt"),
        ("/a", "/"),
        ("/a", "/mnt/"),
        ("/a", "//mnt"),
        ("/a", "/mnt/../etc"),
        ("/a\0b", "/mnt"),
    ],
)
async def test_what_is_no_volume(api: httpx2.AsyncClient, source: str, target: str) -> None:
    body = {"snapshot_tag": "base", "volumes": [{"source": source, "target": target}]}
    answer = await api.post("/v1/sandboxes", json=body)
    assert answer.status_code == 400, answer.text
    twice = [{"source": "/a", "target": "/mnt"}] * 2
    answer = await api.post("/v1/sandboxes", json={"snapshot_tag": "base", "volumes": twice})
    assert (answer.status_code, "same target" in answer.text) == (400, True)
