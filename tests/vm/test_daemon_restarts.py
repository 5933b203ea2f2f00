"""Sandboxes outlive the daemon, however it ends, and the next one has them."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from daemon_process import DaemonProcess, daemon
from processes import is_running
from ratoon import Client, Sandbox

pytest_plugins = ["daemon_plugin"]


def run(running: DaemonProcess, sandbox: str, script: str) -> str:
    body = {"args": ["sh", "-c", script], "timeout_secs": 100}
    answer = running.api.post(f"/v1/sandboxes/{sandbox}/exec", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["stdout"])


def fork(running: DaemonProcess, **options: object) -> str:
    answer = running.api.post("/v1/sandboxes", json={"snapshot_tag": "base", **options})
    assert answer.status_code == 201, answer.text
    return str(answer.json()[0]["id"])


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_sandboxes_live_on(place: tuple[Path, Path], ending: int) -> None:
    with daemon(*place) as before:
        sandbox = fork(before, metadata={"a": "b"}, ttl_seconds=5000)
        asleep = fork(before)
        lost = fork(before)
        run(before, sandbox, "echo kept >/dev/shm/note")
        before.api.post(f"/v1/sandboxes/{sandbox}/branch", json={"tag": "made", "mode": "diff"})
        before.api.post(f"/v1/sandboxes/{asleep}/standby")
        known = before.api.get(f"/v1/sandboxes/{sandbox}").json()
        dying = before.api.get(f"/v1/sandboxes/{lost}").json()["pid"]
        before.stop(ending)
        assert is_running(known["pid"])
    os.kill(dying, signal.SIGKILL)
    with daemon(*place) as after:
        found = {each["id"]: each for each in after.api.get("/v1/sandboxes").json()}
        assert {name: each["state"] for name, each in found.items()} == {
            sandbox: "running",
            asleep: "standby",
            lost: "dead",
        }
        same = set(known) - {"fork_ms", "stages_ms", "idle_for_seconds", "layers"}
        assert {name: known[name] for name in same} == {name: found[sandbox][name] for name in same}
        assert run(after, sandbox, "cat /dev/shm/note") == "kept\n"
        assert after.api.post(f"/v1/sandboxes/{asleep}/resume").status_code == 200
        assert run(after, fork(after, snapshot_tag="made"), "cat /dev/shm/note") == "kept\n"
        pids = [each["pid"] for each in after.api.get("/v1/sandboxes").json() if each["pid"]]
        for each in after.api.get("/v1/sandboxes").json():
            assert after.api.delete(f"/v1/sandboxes/{each['id']}").status_code == 204
        assert not [pid for pid in pids if is_running(pid)]


def make_for(running: DaemonProcess, script: str, **options: Any) -> str:
    with Client(f"unix://{running.socket}") as client:
        sandbox = Sandbox.create("base", client=client, **options)
        argv = ["sh", "-c", script]
        sandbox.commands.start(argv, background=True, main=True).disconnect()
        return sandbox.id


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_what_ends_while_there_is_no_daemon(place: tuple[Path, Path], ending: int) -> None:
    on_demand = "until [ -e /tmp/end ]; do sleep 0.1; done; exit 42"
    with daemon(*place) as before:
        ended = make_for(before, "exit 7")
        assert before.api.post(f"/v1/sandboxes/{ended}/wait").json()["ended"]["exit_code"] == 7
        before.api.post(f"/v1/sandboxes/{ended}/standby")
        ends = make_for(before, on_demand)
        goes = make_for(before, on_demand, auto_remove=True)
        for each in ends, goes:
            run(before, each, "(sleep 10; touch /tmp/end) >/dev/null 2>&1 &")
        before.stop(ending)
    time.sleep(15)
    with daemon(*place) as after:
        found = after.api.get(f"/v1/sandboxes/{ended}").json()
        assert found["status"] == "standby, exited (7)"
        assert after.api.post(f"/v1/sandboxes/{ends}/wait").json()["ended"]["exit_code"] == 42
        while goes in [each["id"] for each in after.api.get("/v1/sandboxes").json()]:
            time.sleep(0.1)
        for each in ended, ends:
            stopped = after.api.post(f"/v1/sandboxes/{each}/stop").json()
            assert stopped["ended"] is not None


def test_who_waits_does_not_hold_up_the_daemon(place: tuple[Path, Path]) -> None:
    with daemon(*place, "--stop-sandboxes") as running, ThreadPoolExecutor() as pool:
        sandbox = make_for(running, "sleep 1000")
        waiting = pool.submit(running.api.post, f"/v1/sandboxes/{sandbox}/wait")
        time.sleep(1)
        running.stop()
        assert waiting.result().json()["ended"] is None


def test_sandboxes_end_with_the_daemon_if_asked(place: tuple[Path, Path]) -> None:
    with daemon(*place, "--stop-sandboxes") as running:
        sandbox = fork(running)
        pid = running.api.get(f"/v1/sandboxes/{sandbox}").json()["pid"]
        assert running.stop()[0] == 0
    assert not is_running(pid)
