"""Images that lie on the daemon's host: over TCP, only where they may."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest

from ratoon.daemon.app import create_app
from ratoon.daemon.settings import Settings
from ratoon.engine.sandbox.engine import Engine

pytest_plugins = ["app_fixtures"]

TCP, UNIX = "http://localhost:8889", "http://localhost"


@pytest.mark.parametrize("route", ["/v1/snapshots", "/v1/runs"])
async def test_images_of_the_host(route: str, bare_engine: Engine, tmp_path: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()

    choices: list[tuple[Path, ...]] = [(), (allowed,)]
    applications = {
        roots: create_app(bare_engine, Settings(image_roots=roots)) for roots in choices
    }

    async def refused(base: str, image: str, *roots: Path) -> str:
        """Why an image is not taken; all of these are of no use in the end."""
        transport = httpx2.ASGITransport(applications[roots], raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url=base) as client:
            body = {"image": image} | ({"tag": "new"} if route == "/v1/snapshots" else {})
            response = await client.post(route, json=body)
        assert response.status_code == 400, response.text
        return str(response.json()["error"])

    for kind in ("dir", "tar", "oci", "oci-archive", "docker-archive"):
        outside, absent = f"{kind}:/etc/passwd", f"{kind}:{allowed}/absent"
        assert "--image-root" in await refused(TCP, outside)
        assert "is not below" in await refused(TCP, outside, allowed)
        assert "No such file" in await refused(TCP, absent, allowed)
        assert "No such file" in await refused(UNIX, absent)
