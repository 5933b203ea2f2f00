"""Sandboxes over HTTP, beyond what other clients know: options, standby, forks, ports, files."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import tarfile
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from served_daemon import Served, serving
from vm_helpers import FOR_EVER, until

from ratoon.daemon.settings import Settings
from ratoon.engine.sandbox.engine import Engine
from ratoon.engine.sandbox.layer import publish_layer
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import HostError, RatoonError
from ratoon.machine.guest import commands

pytest_plugins = ["daemon_plugin"]


async def sh(served: Served, sandbox: str, script: str) -> str:
    """What `script` prints in a sandbox."""
    body = {"args": ["sh", "-c", script], "timeout_secs": FOR_EVER}
    answer = await served.api.post(f"/v1/sandboxes/{sandbox}/exec", json=body)
    done = answer.json()
    assert done["exit_code"] == 0, done
    return str(done["stdout"])


async def test_options_are_kept_shown_and_changed(forked: Served) -> None:
    options: dict[str, Any] = {
        "metadata": {"task": "7", "kind": "a:b"},
        "ttl_seconds": 500,
        "idle_seconds": 400,
        "limits": {"cpus": 1.5},
        "network": "none",
    }
    (sandbox,) = await forked.fork(**options)
    path = f"/v1/sandboxes/{sandbox}"
    info = (await forked.api.get(path)).json()
    assert {name: info[name] for name in options if name != "limits"} == {
        name: value for name, value in options.items() if name != "limits"
    }
    assert info["limits"] == {"memory_mib": None, "cpus": 1.5, "pids": None, "disk_mib": None}
    changed = await forked.api.patch(path, json={"ttl_seconds": None, "metadata": {"task": "8"}})
    assert changed.json()["ttl_seconds"] is None
    assert changed.json()["idle_seconds"] == 400
    for query, found in (
        ("metadata=task:8", True),
        ("metadata=task:7", False),
        ("metadata=task:8&metadata=kind:a", False),
        ("state=running&metadata=task:8", True),
        ("state=standby", False),
    ):
        listed = (await forked.api.get(f"/v1/sandboxes?{query}")).json()
        assert (sandbox in [each["id"] for each in listed]) is found, query
    assert (await forked.api.get("/v1/sandboxes?metadata=task")).status_code == 400
    await forked.api.patch(path, json={"ttl_seconds": 0.001})
    await until(lambda: sandbox not in [s.id for s in forked.engine.sandboxes], "its time to end")


async def test_what_it_was_made_for(forked: Served) -> None:
    (sandbox,) = await forked.fork()
    path = f"/v1/sandboxes/{sandbox}"
    info = (await forked.api.get(path)).json()
    assert (info["status"], info["command"], info["stop_signal"]) == ("running", None, "SIGTERM")
    assert (await forked.api.post(f"{path}/wait")).status_code == 409
    argv = ["sh", "-c", "until [ -e /tmp/end ]; do sleep 0.05; done; exit 42"]
    begun = commands.start(forked.engine.get(sandbox), argv, background=True, main=True)
    async with begun as command:
        pid = command.pid
    running = (await forked.api.post(f"{path}/wait", json={"timeout_secs": 0.1})).json()
    assert running == {"pid": pid, "ended": None}
    assert (await forked.api.get(path)).json()["status"] == "running"
    async with forked.api.stream("GET", "/v1/events") as events:
        await sh(forked, sandbox, "touch /tmp/end")
        ended = {"pid": pid, "ended": {"exit_code": 42, "reason": None}}
        assert (await forked.api.post(f"{path}/wait")).json() == ended
        async for line in events.aiter_lines():
            if line:
                event = json.loads(line)
                break
    assert (event["kind"], event["sandbox"], event["exit_code"]) == ("exited", sandbox, 42)
    info = (await forked.api.get(path)).json()
    assert (info["state"], info["status"], info["command"]) == ("running", "exited (42)", ended)
    stood_by = (await forked.api.post(f"{path}/standby")).json()["sandbox"]
    assert stood_by["status"] == "standby, exited (42)"
    assert (await forked.api.post(f"{path}/stop", json={"timeout_secs": -1})).status_code == 400
    stopped = await forked.api.post(f"{path}/stop")
    assert stopped.json() == {"ended": ended["ended"], "unsynced": None}
    assert (await forked.api.get(path)).status_code == 404
    wrong = {"snapshot_tag": "base", "stop_signal": "SIGRTMIN+99"}
    refused = await forked.api.post("/v1/sandboxes", json=wrong)
    assert (refused.status_code, "no signal SIGRTMIN+99" in refused.text) == (400, True)


async def test_standby_resume_and_reset(forked: Served) -> None:
    (sandbox,) = await forked.fork()
    path = f"/v1/sandboxes/{sandbox}"
    await sh(forked, sandbox, "echo here >/dev/shm/note")
    stood_by = (await forked.api.post(f"{path}/standby")).json()
    assert (stood_by["sandbox"]["state"], stood_by["sandbox"]["pid"]) == ("standby", None)
    assert stood_by["stages_ms"]["pause"] > 0
    for verb, body in (("exec", {"args": ["true"]}), ("standby", {}), ("branch", {}), ("ping", {})):
        answer = await forked.api.post(f"{path}/{verb}", json=body)
        assert answer.status_code == 409, verb
    resumed = (await forked.api.post(f"{path}/resume")).json()
    assert resumed["sandbox"]["state"] == "running"
    assert (await forked.api.post(f"{path}/resume")).status_code == 409
    assert await sh(forked, sandbox, "cat /dev/shm/note; echo more >>/dev/shm/note") == "here\n"
    reset = (await forked.api.post(f"{path}/reset")).json()
    assert reset["sandbox"]["id"] == sandbox
    assert await sh(forked, sandbox, "ls /dev/shm") == "", "as its snapshot, not as its standby"


async def test_forks_of_a_sandbox_have_its_options_unless_others_are_given(
    forked: Served,
) -> None:
    (sandbox,) = await forked.fork(metadata={"of": "source"}, ttl_seconds=600)
    await sh(forked, sandbox, "echo 1 >/dev/shm/note")
    answer = await forked.api.post(
        f"/v1/sandboxes/{sandbox}/fork", json={"n": 2, "metadata": {"of": "fork"}}
    )
    assert answer.status_code == 201
    for info in answer.json():
        assert (info["metadata"], info["ttl_seconds"]) == ({"of": "fork"}, 600)
        assert info["snapshot_tag"] == "base"
        assert await sh(forked, info["id"], "cat /dev/shm/note") == "1\n"


async def test_a_burst_that_fails_in_part_says_so(
    forked: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, outcomes = forked.engine._fork, iter([True, False, True, False, False])

    async def faulty(*arguments: object, **options: object) -> Sandbox:
        if next(outcomes):
            return await real(*arguments, **options)  # type: ignore[arg-type]
        raise HostError("no more of it")

    monkeypatch.setattr(forked.engine, "_fork", faulty)
    answer = await forked.api.post("/v1/sandboxes", json={"snapshot_tag": "base", "n": 3})
    assert (answer.status_code, answer.headers["Ratoon-Failed"]) == (201, "1")
    assert len(answer.json()) == 2
    failures = (await forked.api.get("/v1/sandboxes/failures")).json()
    assert failures == {
        "snapshot_tag": "base",
        "errors": [{"error": "no more of it", "kind": "HostError", "details": {}}],
    }
    none = await forked.api.post("/v1/sandboxes", json={"snapshot_tag": "base", "n": 2})
    assert (none.status_code, none.json()["kind"]) == (500, "HostError")


async def test_more_branches_than_may_be_are_refused_with_the_number(
    forked: Served, shared_sandbox: str
) -> None:
    slots = forked.daemon.branches
    path = f"/v1/sandboxes/{shared_sandbox}/branch"
    with slots.take(), slots.take(), slots.take():
        assert (await forked.api.post(path, json={"tag": "fourth"})).status_code == 201
        with slots.take():
            refused = await forked.api.post(path, json={"tag": "fifth"})
    assert refused.status_code == 503
    assert "4" in refused.json()["error"]
    assert slots.taken == 0


async def test_a_live_branch_takes_a_slot_until_it_is_written(
    forked: Served, shared_sandbox: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()

    def held_back(*arguments: Any, **options: Any) -> Any:
        assert may_write.wait(FOR_EVER)
        return publish_layer(*arguments, **options)

    monkeypatch.setattr("ratoon.engine.sandbox.branch.publish_layer", held_back)
    try:
        body = {"mode": "live", "wait": False, "tag": "live"}
        answer = await forked.api.post(f"/v1/sandboxes/{shared_sandbox}/branch", json=body)
        assert answer.status_code == 202
        assert answer.json()["status"] == "writing"
        assert forked.daemon.branches.taken == 1
        listed = (await forked.api.get("/v1/snapshots")).json()
        assert ("live", "writing", False) in [
            (each["tag"], each["status"], each["bootable"]) for each in listed
        ]
        for method, path in (("DELETE", "/v1/snapshots/live"), ("GET", "/v1/snapshots/live/info")):
            assert (await forked.api.request(method, path)).status_code == 409
        for path, again in (
            ("/v1/sandboxes", {"snapshot_tag": "live"}),
            (f"/v1/sandboxes/{shared_sandbox}/branch", body),
        ):
            assert (await forked.api.post(path, json=again)).status_code == 409
    finally:
        may_write.set()
    await forked.engine.settle()
    await until(lambda: forked.daemon.branches.taken == 0, "the slot to be free")
    assert (await forked.api.get("/v1/snapshots/live")).json()["status"] == "ready"


async def test_a_live_branch_that_fails_is_told_of_until_it_is_deleted(
    forked: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sandbox,) = await forked.fork()

    def failing(*arguments: Any, **options: Any) -> Any:
        raise HostError("no room for it")

    monkeypatch.setattr("ratoon.engine.sandbox.branch.publish_layer", failing)
    path, body = f"/v1/sandboxes/{sandbox}/branch", {"mode": "live", "wait": False, "tag": "live"}
    assert (await forked.api.post(path, json=body)).status_code == 202
    await forked.engine.settle()
    shown = (await forked.api.get("/v1/snapshots/live")).json()
    assert (shown["status"], shown["bootable"]) == ("failed", False)
    assert "no room for it" in shown["error"]
    fork = await forked.api.post("/v1/sandboxes", json={"snapshot_tag": "live"})
    assert fork.status_code == 409
    assert "no room for it" in fork.json()["error"]
    assert (await forked.api.delete("/v1/snapshots/live")).status_code == 204
    assert (await forked.api.get("/v1/snapshots/live")).status_code == 404


async def test_files(forked: Served, shared_sandbox: str) -> None:
    path = f"/v1/sandboxes/{shared_sandbox}/files"
    api, where = forked.api, {"path": "/root/dir/file"}
    content = bytes(range(256)) * 4096
    assert (await api.put(path, params=where, content=content)).status_code == 404
    written = await api.put(
        path, params={**where, "parents": "true", "mode": "600"}, content=content
    )
    assert written.json() == {"size_bytes": len(content)}
    assert (await api.get(path, params=where)).content == content
    part = await api.get(path, params={**where, "offset": "1000", "length": "5"})
    assert part.content == content[1000:1005]
    assert (await api.put(path, params={**where, "append": "true"}, content=b"end")).is_success
    status = (await api.get(f"{path}/stat", params=where)).json()
    assert (status["type"], status["mode"]) == ("file", "0600")
    assert status["size_bytes"] == len(content) + 3
    renamed = await api.post(f"{path}/rename", params={**where, "to": "/root/dir/other"})
    assert renamed.status_code == 204
    link = {"path": "/root/dir/link", "to": "other"}
    assert (await api.post(f"{path}/symlink", params=link)).status_code == 204
    assert (await api.post(f"{path}/symlink", params=link)).status_code == 409
    listed = (await api.get(f"{path}/list", params={"path": "/root/dir"})).json()
    assert [(each["path"], each["target"]) for each in listed] == [
        ("/root/dir/link", "other"),
        ("/root/dir/other", None),
    ]
    refused = await api.delete(path, params={"path": "/root/dir"})
    assert (refused.status_code, refused.json()["kind"]) == (409, "GuestFileExists")
    gone = await api.delete(path, params={"path": "/root/dir", "recursive": "true"})
    assert gone.status_code == 204
    for method in ("GET", "DELETE"):
        missing = await api.request(method, path, params=where)
        assert (missing.status_code, missing.json()["kind"]) == (404, "GuestFileNotFound")
    for bad in ({}, {"path": ""}, {"path": "a\0b"}, {"path": "/x", "mode": "9"}):
        answer = await api.put(path, params=bad, content=b"")
        assert answer.status_code in (400, 422), bad


async def test_names_that_are_not_text(forked: Served, shared_sandbox: str) -> None:
    """Any bytes are a name on Linux; they come through, in both directions."""
    path, name = f"/v1/sandboxes/{shared_sandbox}/files", "%FF%FE%20x"
    await forked.api.post(f"{path}/mkdir?path=/root/strange")
    written = await forked.api.put(f"{path}?path=/root/strange/{name}", content=b"content")
    assert written.status_code == 200
    listed = await forked.api.get(f"{path}/list?path=/root/strange")
    assert listed.json()[0]["path"] == "/root/strange/\udcff\udcfe x"
    assert (await forked.api.get(f"{path}?path=/root/strange/{name}")).content == b"content"
    missing = await forked.api.get(f"{path}?path=/root/strange/{name}{name}")
    assert missing.status_code == 404
    assert "No such file" in missing.json()["error"]


async def test_trees(forked: Served, shared_sandbox: str) -> None:
    path = f"/v1/sandboxes/{shared_sandbox}/files/tar"
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name in ("one", "two"):
            member = tarfile.TarInfo(f"tree/{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    sent = await forked.api.put(path, params={"path": "/root/tree"}, content=raw.getvalue())
    assert (sent.status_code, sent.json()["left_out_count"]) == (200, 0)
    back = await forked.api.get(path, params={"path": "/root/tree/tree"})
    with tarfile.open(fileobj=io.BytesIO(back.content)) as tar:
        assert sorted(tar.getnames()) == [".", "one", "two"]
        file = tar.extractfile("one")
        assert file is not None
        assert file.read() == b"one"
    assert (await forked.api.get(path, params={"path": "/absent"})).status_code == 404
    broken = await forked.api.put(path, params={"path": "/root/broken"}, content=b"no tar")
    assert (broken.status_code, broken.json()["kind"]) == (400, "InvalidInput")


async def test_an_upload_that_breaks_off_leaves_the_old_file(
    forked: Served, shared_sandbox: str
) -> None:
    path = f"/v1/sandboxes/{shared_sandbox}/files?path=/root/kept"
    await forked.api.put(path, content=b"old")

    async def broken() -> AsyncIterator[bytes]:
        yield b"new" * 100_000
        raise ConnectionError("the client broke off")

    with pytest.raises(ConnectionError):
        await forked.api.put(path, content=broken())
    assert (await forked.api.get(path)).content == b"old"
    await sh(forked, shared_sandbox, "test $(ls -A /root | grep -c kept) = 1")


async def test_published_ports(forked: Served) -> None:
    (sandbox,) = await forked.fork(publish=[{"guest_port": 8000}])
    ports = f"/v1/sandboxes/{sandbox}/ports"
    (port,) = (await forked.api.get(ports)).json()
    assert port["guest_port"] == 8000
    server = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=8000)"
    body = {"code": f"import threading; threading.Thread(target=lambda: exec({server!r})).start()"}
    assert (await forked.api.post(f"/v1/sandboxes/{sandbox}/eval", json=body)).json()[
        "exit_code"
    ] == 0
    await sh(forked, sandbox, "while ! grep -q ':1F40 ' /proc/net/tcp; do sleep 0.1; done")
    async with httpx2.AsyncClient(timeout=FOR_EVER) as client:
        answer = await client.get(f"http://127.0.0.1:{port['host_port']}/etc/")
    assert "hostname" in answer.text
    again = await forked.api.post(ports, json={"guest_port": 8001, "host_port": port["host_port"]})
    assert again.status_code == 409
    assert (await forked.api.delete(f"{ports}/8000")).status_code == 204
    assert (await forked.api.delete(f"{ports}/8000")).status_code == 404
    assert (await forked.api.get(ports)).json() == []


async def test_events(forked: Served) -> None:
    async with forked.api.stream("GET", "/v1/events") as answer:
        lines = answer.aiter_lines()
        assert await anext(lines) == ""
        (sandbox,) = await forked.fork()
        path = f"/v1/sandboxes/{sandbox}"
        await forked.api.post(f"{path}/branch", json={"tag": "seen", "mode": "diff"})
        for verb in ("standby", "resume", "reset"):
            await forked.api.post(f"{path}/{verb}")
        await forked.api.delete("/v1/snapshots/seen")
        os.kill(forked.engine.get(sandbox).pid, signal.SIGKILL)
        told: list[tuple[str, ...]] = []
        async for line in lines:
            if line:
                event = json.loads(line)
                told.append((event["kind"], event["sandbox"] or event["snapshot"]))
                if event["kind"] == "died":
                    await forked.api.delete(path)
                elif event["kind"] == "killed":
                    break
    kinds = ["created", "branched", "standby", "resumed", "reset"]
    assert told == [
        *((kind, sandbox) for kind in kinds),
        ("snapshot_deleted", "seen"),
        *(("died", sandbox), ("killed", sandbox)),
    ]


async def test_a_dead_sandbox_is_shown_as_such(forked: Served) -> None:
    (sandbox,) = await forked.fork()
    os.kill(forked.engine.get(sandbox).pid, signal.SIGKILL)
    path = f"/v1/sandboxes/{sandbox}"
    answer = await forked.api.post(f"{path}/exec", json={"args": ["true"]})
    assert (answer.status_code, answer.json()["kind"]) == (500, "MachineDied")
    assert (await forked.api.get(path)).json()["state"] == "dead"
    assert (await forked.api.delete(path)).status_code == 204


async def test_workspaces(forked: Served) -> None:
    api = forked.api
    created = await api.post("/v1/workspaces", json={"name": "w", "snapshot_tag": "base"})
    assert (created.status_code, created.json()["status"]) == (201, "running")
    again = await api.post("/v1/workspaces", json={"name": "w", "snapshot_tag": "base"})
    assert again.status_code == 409
    assert (await api.post("/v1/workspaces/w/resume")).status_code == 400
    await sh(forked, created.json()["live_sandbox_id"], "echo first >/root/note")
    suspended = (await api.post("/v1/workspaces/w/suspend")).json()
    assert (suspended["status"], "live_sandbox_id" in suspended) == ("suspended", False)
    first = suspended["current_state_tag"]
    assert (await api.post("/v1/workspaces/w/suspend")).status_code == 400
    resumed = (await api.post("/v1/workspaces/w/resume")).json()
    note = await sh(forked, resumed["live_sandbox_id"], "cat /root/note; echo more >>/root/note")
    assert note == "first\n"
    fork = await api.post(f"/v1/sandboxes/{resumed['live_sandbox_id']}/fork")
    suspended = (await api.post("/v1/workspaces/w/suspend", json={"diff": True})).json()
    assert (await api.get(f"/v1/snapshots/{first}")).status_code == 404
    resumed = (await api.post("/v1/workspaces/w/resume")).json()
    assert await sh(forked, resumed["live_sandbox_id"], "cat /root/note") == "first\nmore\n"
    await api.delete(f"/v1/sandboxes/{resumed['live_sandbox_id']}")
    assert (await api.get("/v1/workspaces/w")).json()["status"] == "stale"
    assert (await api.post("/v1/workspaces/w/suspend")).status_code == 400
    resumed = (await api.post("/v1/workspaces/w/resume")).json()
    assert await sh(forked, resumed["live_sandbox_id"], "cat /root/note") == "first\nmore\n"
    assert [each["name"] for each in (await api.get("/v1/workspaces")).json()] == ["w"]
    assert (await api.delete("/v1/workspaces/w")).status_code == 204
    assert await sh(forked, fork.json()[0]["id"], "head -1 /root/note") == "first\n"
    for method, path in (("GET", "w"), ("DELETE", "w"), ("POST", "w/resume"), ("GET", "..%2fx")):
        assert (await api.request(method, f"/v1/workspaces/{path}")).status_code == 404
    assert (await api.get(f"/v1/snapshots/{suspended['current_state_tag']}")).status_code == 404


async def test_a_client_that_leaves_takes_its_command_with_it(
    forked: Served, shared_sandbox: str
) -> None:
    body = {"args": ["sh", "-c", "echo $$ >/root/pid; exec sleep 1000"], "timeout_secs": 1000}
    asking = asyncio.create_task(forked.api.post(f"/v1/sandboxes/{shared_sandbox}/exec", json=body))
    await sh(forked, shared_sandbox, "while ! [ -s /root/pid ]; do sleep 0.1; done")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await sh(forked, shared_sandbox, "while [ -e /proc/$(cat /root/pid) ]; do sleep 0.1; done")


async def test_a_client_that_leaves_during_a_fork_leaves_no_sandbox(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, outcome = asyncio.Event(), asyncio.Event()
    real = engine.fork

    async def seen(*arguments: object, **options: object) -> list[Sandbox | RatoonError]:
        asked.set()
        try:
            return await real(*arguments, **options)  # type: ignore[arg-type]
        finally:
            outcome.set()

    monkeypatch.setattr(engine, "fork", seen)
    before = engine.sandboxes
    place = tmp_path_factory.mktemp("run")
    async with serving(engine, place, Settings()) as served:
        asking = asyncio.create_task(served.fork(4))
        await asked.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await outcome.wait()
    assert engine.sandboxes == before
