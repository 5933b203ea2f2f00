"""A daemon is killed at any moment under load; the next one has what the first has told of.

Machines, too: their sandboxes are listed as dead then.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import httpx2

from daemon_process import DaemonProcess
from processes import is_running
from ratoon.machine.vmm.process import started_at

WORKERS = 3
#: Sandboxes that go into the next round, which checks each.
SURVIVORS = 8


class Told:
    """What a daemon has acknowledged: snapshots that are there, and sandboxes that are gone.

    `felled`: those whose machines were killed, by their ids.
    """

    def __init__(self) -> None:
        self.snapshots: set[str] = set()
        self.killed: set[str] = set()
        self.felled: set[str] = set()


class Worker(threading.Thread):
    """Asks for this and that, until the daemon is gone."""

    def __init__(self, running: DaemonProcess, told: Told, name: str, seed: int) -> None:
        super().__init__(name=name)
        self._running, self._told, self._random = running, told, random.Random(seed)
        self._number = 0
        self.asked = 0

    def run(self) -> None:
        transport = httpx2.HTTPTransport(uds=str(self._running.socket))
        with httpx2.Client(transport=transport, base_url="http://ratoon", timeout=100) as api:
            try:
                while True:
                    self._ask(api)
                    self.asked += 1
            except httpx2.TransportError:
                return

    def _ask(self, api: httpx2.Client) -> None:
        mine = [
            each["id"]
            for each in api.get(f"/v1/sandboxes?metadata=of:{self.name}").json()
            if each["state"] != "dead"
        ]
        if len(mine) < 2:
            body = {"snapshot_tag": "base", "metadata": {"of": self.name}}
            assert api.post("/v1/sandboxes", json=body).status_code in (201, 503)
            return
        sandbox = self._random.choice(mine)
        path = f"/v1/sandboxes/{sandbox}"
        match self._random.choice(["exec", "branch", "branch", "live", "standby", "reset", "kill"]):
            case "exec":
                api.post(f"{path}/exec", json={"args": ["sh", "-c", "echo x >>/root/x; sync"]})
            case "branch" | "live" as how:
                self._number += 1
                tag = f"{self.name}-{self._number}"
                mode = "live" if how == "live" else "diff"
                answer = api.post(f"{path}/branch", json={"tag": tag, "mode": mode})
                if answer.status_code == 201:
                    self._told.snapshots.add(tag)
            case "standby":
                if api.post(f"{path}/standby").status_code == 200:
                    api.post(f"{path}/resume")
            case "reset":
                api.post(f"{path}/reset")
            case "kill":
                if api.delete(path).status_code == 204:
                    self._told.killed.add(sandbox)


def look_after(running: DaemonProcess, told: Told) -> None:
    """All that was told of is there, and all that is there answers."""
    api = running.api
    listed = {each["tag"]: each for each in api.get("/v1/snapshots").json()}
    assert told.snapshots <= set(listed)
    assert all(listed[tag]["bootable"] for tag in told.snapshots)
    for sandbox in api.get("/v1/sandboxes").json():
        path = f"/v1/sandboxes/{sandbox['id']}"
        assert sandbox["id"] not in told.killed
        if sandbox["state"] == "dead" and sandbox["id"] in told.felled:
            assert running.api.delete(path).status_code == 204
            continue
        assert sandbox["state"] in ("running", "standby"), sandbox
        if sandbox["state"] == "standby":
            assert api.post(f"{path}/resume").status_code == 200
        done = api.post(
            f"{path}/exec", json={"args": ["sh", "-c", "echo here"], "timeout_secs": 100}
        )
        assert done.json().get("stdout") == "here\n", done.text
    assert api.post("/v1/check").json()["sound"]


def thin_out(running: DaemonProcess, told: Told) -> None:
    """Kill the oldest sandboxes; those of this daemon's predecessors are really gone, too."""
    listed = running.api.get("/v1/sandboxes").json()
    for sandbox in sorted(listed, key=lambda each: each["id"])[:-SURVIVORS]:
        assert running.api.delete(f"/v1/sandboxes/{sandbox['id']}").status_code == 204
        told.killed.add(sandbox["id"])
        assert sandbox["pid"] is None or not is_running(sandbox["pid"])


def fell(store: Path, told: Told, share: float, chance: random.Random) -> None:
    """Kill some machines of a store that has no daemon, each as likely as `share` says."""
    for path in sorted(store.glob("sandboxes/*/state.json")):
        run = json.loads(path.read_bytes())["run"]
        if run is None or chance.random() >= share:
            continue
        with suppress(ProcessLookupError):
            if started_at(run["pid"]) == run["started"]:
                os.kill(run["pid"], signal.SIGKILL)
                told.felled.add(path.parent.name)


def kill_under_load(
    daemon: Callable[[], AbstractContextManager[DaemonProcess]],
    rounds: int,
    store: Path | None = None,
) -> None:
    """`daemon` is one of a store with a snapshot `base`; in the end all else is gone from it.

    With `store`, which is that, machines are killed as well: none of them, some, or all.
    """
    chance, told = random.Random(20261121), Told()
    for number in range(rounds):
        with daemon() as running:
            look_after(running, told)
            thin_out(running, told)
            workers = [
                Worker(running, told, f"r{number}-w{each}", number * WORKERS + each)
                for each in range(WORKERS)
            ]
            for worker in workers:
                worker.start()
            answers = chance.randrange(3, 16)
            while sum(worker.asked for worker in workers) < answers:
                assert all(worker.is_alive() for worker in workers)
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.5))  # so that it is in the midst of something
            os.kill(running.process.pid, signal.SIGKILL)
            for worker in workers:
                worker.join()
        if store is not None:
            fell(store, told, chance.choice([0, 0.3, 1]), chance)
    with daemon() as running:
        look_after(running, told)
        for sandbox in running.api.get("/v1/sandboxes").json():
            assert running.api.delete(f"/v1/sandboxes/{sandbox['id']}").status_code == 204
        for tag in sorted(told.snapshots):
            answer = running.api.post("/v1/sandboxes", json={"snapshot_tag": tag})
            assert answer.status_code == 201, answer.text
            assert running.api.delete(f"/v1/sandboxes/{answer.json()[0]['id']}").is_success
