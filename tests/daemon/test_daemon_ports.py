"""Ports that are asked for with a sandbox that is still to be made."""

from __future__ import annotations

import socket
from typing import Any, NoReturn

import httpx2
import pytest

from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.startup.runner import Runner
from ratoon.errors import Conflict, InvalidInput
from ratoon.machine.network.ports import HeldPort

pytest_plugins = ["app_fixtures"]


class Other:
    """A sandbox, as far as its ports go."""

    id = "sb-other"

    def __init__(self, held: HeldPort) -> None:
        self.ports = (held.port,)


def wanted(host_port: int | None) -> dict[str, Any]:
    return {"image": "web", "publish": [{"guest_port": 80, "host_port": host_port}]}


async def test_a_taken_port_is_told_before_anything_is_run(
    api: httpx2.AsyncClient, bare_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = False

    async def run(*_: object, **__: object) -> NoReturn:
        nonlocal ran
        ran = True
        raise InvalidInput("it was to be refused before")

    monkeypatch.setattr(Runner, "run", run)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = await api.post("/v1/runs", json=wanted(port))
        assert (answer.status_code, ran) == (409, False)
        assert f"port {port} of 127.0.0.1 is in use" in answer.json()["error"]
    with HeldPort(80) as held:
        monkeypatch.setattr(Engine, "sandboxes", (Other(held),))
        answer = await api.post("/v1/runs", json=wanted(held.port.host_port))
        assert (answer.status_code, ran) == (409, False)
        assert "leads to sandbox sb-other" in answer.json()["error"]


async def test_a_port_is_held_for_as_long_as_a_run_takes_and_free_if_it_fails(
    api: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HeldPort(80) as held:
        port = held.port.host_port

    async def run(*_: object, **__: object) -> NoReturn:
        with pytest.raises(Conflict, match="in use"):
            HeldPort(80, port)
        raise Conflict("the run failed")

    monkeypatch.setattr(Runner, "run", run)
    answer = await api.post("/v1/runs", json=wanted(port))
    assert answer.json()["error"] == "the run failed"
    with HeldPort(80, port):
        pass
