"""Requests made up from the OpenAPI description, right and wrong, with real machines behind it.

Every answer has a status that is documented for its route, and the content that is: no 500.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served_daemon import Served
from vm_helpers import FOR_EVER

pytest_plugins = ["daemon_plugin"]

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
#: It has no end.
LEFT_OUT = "/v1/events"
#: Answers that are cut short where something goes wrong after they have begun.
STREAMED = ("/files", "/files/tar")
#: In a guest: what can be read, written, neither, and what cannot be.
PATHS = [
    *("/root", "/root/made", "/root/made/below", "root/../etc", "/etc/hostname", "~", "/root/."),
    *("/dev/null", "/dev/vport0p1", "/proc/self/mem", "/proc/sysrq-trigger/x"),
    *("/sys/kernel", "/etc/hostname/below", "/root/" + "x" * 300, "/x" * 3000, "/root/\n\u20ac"),
]
#: Images that are not to be had; others would be asked of registries of the world.
IMAGES = ["debian:potato", "dir:/etc", "tar:/etc/passwd", "oci:", "oci:/x", "No:Such", "-", "\n"]
#: Requests of each kind for a route. A slice takes one route in so many of each kind, because what
#: costs most is to find out what can be asked of one.
EXAMPLES, SOAK_EXAMPLES, SLICE = 3, 60, 3


class Fuzzer:
    """Sends made-up requests; where they name something, it is often something that is there."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._random = random.Random(1)

    def send(self, case: Case[Any]) -> None:
        self._aim(case)
        try:
            response = case.call(base_url=self._served.url, timeout=FOR_EVER)
        except requests.exceptions.ChunkedEncodingError:
            assert case.operation.path.endswith(STREAMED)  # a file that changed meanwhile
            return
        case.validate_response(response, checks=CHECKS)

    def _aim(self, case: Case[Any]) -> None:
        known = case.path_parameters if case.path_parameters is not None else {}
        if "sandbox_id" in known and self._random.random() < 0.7:
            known["sandbox_id"] = self._sandbox()
        for name in ("tag", "other"):
            if name in known and self._random.random() < 0.7:
                known[name] = self._random.choice(["base", "scratch"])
        if "name" in known and self._random.random() < 0.7:
            known["name"] = self._workspace()
        if case.method == "DELETE" and known.get("tag") == "base":
            known["tag"] = "scratch"
        query = case.query or {}
        for name in ("path", "to"):
            if name in query and self._random.random() < 0.6:
                query[name] = self._random.choice(PATHS)
        if isinstance(case.body, dict):
            self._aim_body(case.body)
            if case.path == "/v1/prune":  # what all others need
                case.body["keep"] = ["base"]

    def _aim_body(self, body: dict[str, Any]) -> None:
        if "snapshot_tag" in body and self._random.random() < 0.7:
            body["snapshot_tag"] = self._random.choice(["base", "scratch"])
        for name in ("n", "size"):
            number = body.get(name)
            if type(number) is int and 1 < number <= 1000:
                body[name] = 1
        if "tag" in body and "image" not in body and self._random.random() < 0.5:
            body["tag"] = "scratch"
        if "name" in body and self._random.random() < 0.7:
            body["name"] = "w"
        if isinstance(body.get("image"), str) and body["image"]:
            body["image"] = self._random.choice(IMAGES)
        if "to" in body and self._random.random() < 0.5:
            body["to"] = "scratch"

    def _workspace(self) -> str:
        """The name of one that is there."""
        body = {"name": "w", "snapshot_tag": "base"}
        requests.post(f"{self._served.url}/v1/workspaces", json=body, timeout=FOR_EVER)
        return "w"

    def _sandbox(self) -> str:
        """The id of one that runs."""
        running = [each.id for each in self._served.engine.sandboxes if each.state == "running"]
        if running:
            return self._random.choice(running)
        made = requests.post(
            f"{self._served.url}/v1/sandboxes", json={"snapshot_tag": "base"}, timeout=FOR_EVER
        )
        return str(made.json()[0]["id"])


def operations(served: Served) -> Iterator[Any]:
    described = requests.get(f"{served.url}/openapi.json", timeout=FOR_EVER).json()
    for result in schemathesis.openapi.from_dict(described).get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]
        if operation.path != LEFT_OUT:
            yield operation


def fuzz(served: Served, soak: bool) -> int:
    """How many requests were sent."""
    fuzzer, sent = Fuzzer(served), 0
    for number, operation in enumerate(operations(served)):
        for kind, mode in enumerate((GenerationMode.POSITIVE, GenerationMode.NEGATIVE)):
            if not soak and (number + kind) % SLICE:
                continue

            @seed(20261121)
            @settings(
                max_examples=SOAK_EXAMPLES if soak else EXAMPLES,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode), _=st.none())
            def send(case: Case[Any], _: None) -> None:
                nonlocal sent
                sent += 1
                fuzzer.send(case)

            try:
                send()
            except Unsatisfiable:
                continue  # nothing about this route can be wrong
    return sent


async def test_every_answer_is_as_described(forked: Served, soak: bool) -> None:
    try:
        sent = await asyncio.to_thread(fuzz, forked, soak)
        assert sent > (4000 if soak else 60)
        assert (await forked.api.get("/healthz")).json() == {"ok": True}
    finally:
        for workspace in (await forked.api.get("/v1/workspaces")).json():
            await forked.api.delete(f"/v1/workspaces/{workspace['name']}")
        for stock in (await forked.api.get("/v1/pool")).json():
            await forked.api.put(f"/v1/pool/{stock['tag']}", json={"size": 0})
        await forked.api.post("/v1/compress", json={"undo": True})
