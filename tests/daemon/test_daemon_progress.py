"""How far things are that are being made, for who begins to listen while they are."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.startup.runner import Runner
from ratoon.errors import Conflict

pytest_plugins = ["app_fixtures"]


@pytest.mark.parametrize(
    ("route", "work", "body", "name"),
    [
        ("/v1/runs", "run", {"image": "web"}, "web"),
        ("/v1/snapshots", "from_image", {"image": "web", "tag": "new"}, "new"),
        ("/v1/snapshots/base/compact", "compact", {"to": "flat"}, "flat"),
    ],
)
async def test_a_build_that_began_before_is_seen(
    route: str,
    work: str,
    body: dict[str, str],
    name: str,
    api: httpx2.AsyncClient,
    bare_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, over = asyncio.Event(), asyncio.Event()

    async def long_work(*_: object, progress: Any, **__: object) -> None:
        await asyncio.to_thread(progress, "building")
        told.set()
        await over.wait()
        raise Conflict("it was no use")

    doer = {"run": Runner, "from_image": bare_engine.bases}.get(work, bare_engine)
    monkeypatch.setattr(doer, work, long_work)
    asked = asyncio.ensure_future(api.post(route, json=body))
    await told.wait()
    with bare_engine.events.listen() as listener:
        event = await listener.next()
        assert event is not None
        assert (event.kind, event.snapshot, event.reason) == ("progress", name, "building")
    over.set()
    assert (await asked).status_code == 409
    with bare_engine.events.listen() as listener:
        bare_engine.events.tell("progress", reason="the next")
        event = await listener.next()
        assert event is not None
        assert event.reason == "the next"
