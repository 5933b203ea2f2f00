"""Requests that cannot be right, and how every error is answered."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import httpx2
import pytest
from app_client import application

from ratoon.daemon.settings import Settings
from ratoon.engine.sandbox.engine import Engine

pytest_plugins = ["app_fixtures"]

JSON = {"Content-Type": "application/json"}
FORK = "/v1/sandboxes"


async def post(api: httpx2.AsyncClient, path: str, body: Any) -> tuple[int, str]:
    """The status, and the error that the answer has."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await api.post(path, content=raw, headers=JSON)
    return answer.status_code, answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"nonsense", 400, "not JSON"),
        (b"\xff\xfe{}", 400, ""),
        (b"[" * 100_000, 400, ""),
        (b'{"snapshot_tag": "base", "n": %s}' % (b"9" * 5000), 400, ""),
        (b'{"snapshot_tag": "base", "ttl_seconds": NaN}', 400, "ttl_seconds"),
        (b"", 422, "required"),
        ([], 422, "body"),
        ("base", 422, "body"),
        ({}, 422, "snapshot_tag"),
        ({"snapshot_tag": 1}, 422, "snapshot_tag"),
        ({"snapshot_tag": "base", "n": "1"}, 422, "n:"),
        ({"snapshot_tag": "base", "n": 1.5}, 422, "n:"),
        ({"snapshot_tag": "base", "n": True}, 422, "n:"),
        ({"snapshot_tag": "base", "metadata": {"a": 1}}, 422, "metadata"),
        ({"snapshot_tag": "base", "n": 0}, 400, "n:"),
        ({"snapshot_tag": "base", "n": 1001}, 400, "n:"),
        ({"snapshot_tag": "base", "ttl_seconds": -1}, 400, "ttl_seconds"),
        ({"snapshot_tag": "base", "ttl_seconds": 1e400}, 400, "ttl_seconds"),
        ({"snapshot_tag": "base", "network": "wild"}, 400, "network"),
        ({"snapshot_tag": "base", "memory_limit_mib": 0}, 400, "memory_limit_mib"),
        ({"snapshot_tag": "base", "memory_limit_mib": 1}, 400, "memory_bytes"),
        ({"snapshot_tag": "base", "metadata": {"": "x"}}, 400, "metadata"),
        ({"snapshot_tag": "base", "n": 2, "publish": [{"guest_port": 1, "host_port": 1}]}, 400, ""),
        ({"snapshot_tag": "base", "publish": [{"guest_port": 1, "protocol": "udp"}]}, 422, "'tcp'"),
        ({"snapshot_tag": "base", "user": "no\0body"}, 400, "user"),
        ({"snapshot_tag": "no/tag"}, 400, "bad tag"),
        ({"snapshot_tag": ""}, 400, "bad tag"),
        ({"snapshot_tag": "absent", "unknown": [1]}, 404, "absent"),
    ],
)
async def test_bodies(api: httpx2.AsyncClient, body: Any, status: int, said: str) -> None:
    found, error = await post(api, FORK, body)
    assert found == status
    assert said in error


async def test_a_body_that_does_not_say_that_it_is_json_is_refused(api: httpx2.AsyncClient) -> None:
    """A browser sends such bodies on behalf of any page, without asking."""
    body = b'{"snapshot_tag": "absent"}'
    for headers in ({}, {"Content-Type": "text/plain"}):
        assert (await api.post(FORK, content=body, headers=headers)).status_code == 422


@pytest.mark.parametrize("headers", [{}, JSON])
@pytest.mark.parametrize("verb", ["ping", "branch", "fork", "standby", "resume", "reset"])
async def test_a_body_may_be_absent(
    api: httpx2.AsyncClient, verb: str, headers: dict[str, str]
) -> None:
    answer = await api.post(f"/v1/sandboxes/sb-0-0/{verb}", headers=headers)
    assert (answer.status_code, answer.json()["kind"]) == (404, "NotFound")


async def test_ping_ignores_its_body(api: httpx2.AsyncClient) -> None:
    answer = await api.post("/v1/sandboxes/sb-0-0/ping", content=b"{nonsense", headers=JSON)
    assert answer.status_code == 404


async def test_unknown_paths_and_methods(api: httpx2.AsyncClient) -> None:
    for method, path, status in (
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/sandboxes/", 404),
        ("PUT", "/v1/sandboxes", 405),
        ("POST", "/healthz", 405),
    ):
        answer = await api.request(method, path)
        assert answer.status_code == status, path
        assert answer.json()["error"]


async def test_bodies_are_bounded(bare_engine: Engine) -> None:
    async with application(bare_engine, Settings(max_body_bytes=1000)) as client:
        body = {"snapshot_tag": "x" * 2000}
        answer = await client.post(FORK, json=body)
        assert (answer.status_code, list(answer.json())) == (413, ["error", "kind"])

        async def pieces() -> Any:
            for _ in range(20):
                yield b" " * 100

        answer = await client.post(FORK, content=pieces(), headers=JSON)
        assert answer.status_code == 413


HOSTILE = [
    *("..", ".", "../base", "..%2fbase", "%2e%2e%2fbase", "%2e%2e", "base%2f..", "base%00"),
    *("base%0a", "-%2f..%2f..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "~", "*", "base*", "%ff"),
    *("%20base", "base%20", "b%C3%A4se", "x" * 65, "..%5cbase", "%252e%252e%252fbase"),
]


@pytest.mark.parametrize("name", HOSTILE)
async def test_what_is_no_tag_or_id_never_reaches_a_file(
    bare_engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[str] = []
    real_open = os.open

    def spy(path: Any, *arguments: Any, **named: Any) -> int:
        touched.append(os.fsdecode(path) if not isinstance(path, int) else "")
        return real_open(path, *arguments, **named)

    async with application(bare_engine, Settings()) as api:
        monkeypatch.setattr(os, "open", spy)
        for method, path in (
            ("GET", f"/v1/snapshots/{name}"),
            ("GET", f"/v1/snapshots/{name}/info"),
            ("GET", f"/v1/snapshots/{name}/usage"),
            ("GET", f"/v1/snapshots/base/diff/{name}"),
            ("GET", f"/v1/snapshots/{name}/diff/base"),
            ("DELETE", f"/v1/snapshots/{name}"),
            ("DELETE", f"/v1/snapshots/{name}?force"),
            ("GET", f"/v1/sandboxes/{name}"),
            ("DELETE", f"/v1/sandboxes/{name}"),
            ("POST", f"/v1/sandboxes/{name}/standby"),
            ("GET", f"/v1/sandboxes/{name}/files?path=/etc/passwd"),
        ):
            answer = await api.request(method, path)
            # What the client itself has shortened may be another route, and a good one.
            assert answer.status_code in (404, 405) or name in ("..", "."), (method, path)
        for path, body in (
            ("/v1/snapshots/base/compact", {"to": "PLACE"}),
            ("/v1/sandboxes", {"snapshot_tag": "PLACE"}),
            ("/v1/snapshots", {"tag": "PLACE", "image": "debian"}),
        ):
            raw = json.dumps(body).replace("PLACE", name.replace("%00", "\\u0000"))
            assert (await post(api, path, raw.encode()))[0] in (400, 404), path
    inside = str(bare_engine.store.home)
    strange = [path for path in touched if not path.startswith(inside) and "snapshots" in path]
    assert strange == []
    assert sorted(p.name for p in bare_engine.store.snapshots.iterdir()) == ["L1", "L2", "base"]
    assert not [*bare_engine.store.staging.iterdir()]


async def test_what_takes_too_long_is_given_up(
    bare_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = asyncio.Event()

    async def for_ever(*arguments: object, **options: object) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    monkeypatch.setattr(bare_engine, "fork", for_ever)
    async with application(bare_engine, Settings(request_seconds=0.05)) as client:
        answer = await client.post(FORK, json={"snapshot_tag": "base"})
    assert (answer.status_code, answer.json()["kind"]) == (504, "Timeout")
    assert given_up.is_set()
