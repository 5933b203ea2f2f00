"""The OpenAPI description is complete: what it says is tested elsewhere."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

pytest_plugins = ["app_fixtures"]

ERROR = {"$ref": "#/components/schemas/ErrorAnswer"}


@pytest.fixture
async def described(api: httpx2.AsyncClient) -> list[tuple[str, dict[str, Any]]]:
    """Each operation, by method and path."""
    paths = (await api.get("/openapi.json")).json()["paths"]
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in paths.items()
        for method, operation in methods.items()
    ]


async def test_errors_have_one_form(described: list[tuple[str, dict[str, Any]]]) -> None:
    for name, operation in described:
        for status, answer in operation["responses"].items():
            if status >= "400":
                schema = answer["content"]["application/json"]["schema"]
                assert schema == ERROR, (name, status)


async def test_every_route_says_what_may_go_wrong(
    described: list[tuple[str, dict[str, Any]]],
) -> None:
    for name, operation in described:
        found = set(operation["responses"])
        assert len({status for status in found if status < "300"}) >= 1, name
        if name == "GET /healthz":
            continue
        assert {"401", "403", "500", "504"} <= found, name
        if "{sandbox_id}" in name or "{tag}" in name or "{name}" in name:
            assert "404" in found, name
        if "requestBody" in operation:
            assert {"400", "413", "422"} <= found, name


async def test_every_route_is_explained(described: list[tuple[str, dict[str, Any]]]) -> None:
    for name, operation in described:
        assert operation["description"].endswith((".", "…")), name
        assert operation["tags"], name
