"""The published client of another runtime, unmodified, against the daemon and real machines."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
from forkd import Controller
from forkd.controller import ControllerError
from served_daemon import Served
from vm_helpers import until

T = TypeVar("T")

pytest_plugins = ["daemon_plugin"]


async def call(function: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """The client blocks."""
    return await asyncio.to_thread(function, *arguments, **named)


@pytest.fixture
def forkd(served: Served) -> Controller:
    return Controller(served.url, timeout=120)


async def test_sandboxes_from_spawn_to_kill(forked: Served, forkd: Controller) -> None:
    made = await call(
        forkd.spawn_sandboxes, "base", n=2, per_child_netns=True, memory_limit_mib=512, prewarm=True
    )
    assert len(made) == 2
    for info in made:
        assert re.fullmatch(r"sb-[0-9a-f]{8}-[0-9a-f]{4}", info["id"])
        assert info["snapshot_tag"] == "base"
        assert (info["has_branched"], info["branch_count"]) == (False, 0)
        assert info["memory_limit_mib"] == 512
        for field in ("netns", "guest_addr", "last_branch_memory_path"):
            assert info[field] is None
        assert Path(f"/proc/{info['pid']}").exists()
    one, other = (info["id"] for info in made)
    listed = await call(forkd.list_sandboxes)
    assert {info["id"] for info in listed} == {one, other}
    assert (await call(forkd.get_sandbox, one))["id"] == one
    pong = await call(forkd.ping_sandbox, one)
    assert (pong["pong"], pong["pid"], pong["agent_lang"]) == (True, 1, "python")
    await call(forkd.kill_sandbox, other)
    for missing in (forkd.get_sandbox, forkd.ping_sandbox, forkd.kill_sandbox):
        with pytest.raises(ControllerError) as refused:
            await call(missing, other)
        assert refused.value.status == 404
        assert other in refused.value.body["error"]


async def test_commands_and_code(forked: Served, forkd: Controller) -> None:
    (sandbox,) = await forked.fork()
    done = await call(forkd.exec_command, sandbox, ["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done["stdout"], done["stderr"], done["exit_code"]) == ("out\n", "err\n", 3)
    slow = await call(forkd.exec_command, sandbox, ["sleep", "100"], timeout_secs=1)
    assert (slow["exit_code"], slow["timed_out"]) == (124, True)
    assert "1 s" in slow["stderr"]
    missing = await call(forkd.exec_command, sandbox, ["no-such-program"])
    assert missing["exit_code"] == 127
    assert "no-such-program" in missing["stderr"]
    assert "no-such-program" in missing["reason"]
    for args in ([], ["a\0b"]):
        with pytest.raises(ControllerError) as refused:
            await call(forkd.exec_command, sandbox, args)
        assert refused.value.status == 400
    await call(forkd.eval_code, sandbox, "x = 6")
    done = await call(forkd.eval_code, sandbox, "x * 7")
    assert (done["result"], done["error"], done["exit_code"]) == ("42", None, 0)
    failed = await call(forkd.eval_code, sandbox, "1 / 0")
    assert failed["exit_code"] == 1
    assert "ZeroDivisionError" in failed["error"]


async def test_branches_in_each_mode(forked: Served, forkd: Controller) -> None:
    (sandbox,) = await forked.fork()

    async def write(text: str) -> None:
        await call(forkd.exec_command, sandbox, ["sh", "-c", f"echo {text} >/root/state; sync"])

    await write("full")
    full = await call(forkd.branch_sandbox, sandbox)
    assert re.fullmatch(rf"branch-{sandbox}-[0-9]+-[0-9a-f]{{4}}", full["tag"])
    assert (full["status"], full["bootable"], full["branched_from"]) == ("ready", True, sandbox)
    assert full["pause_ms"] > 0
    assert not {"diff_ms", "parent_tag"} & set(full)
    for name in ("memory.bin", "vmstate"):
        assert (Path(full["dir"]) / name).stat().st_size > 0

    await write("measured")
    measured = await call(forkd.branch_sandbox, sandbox, tag="measured", measure_diff=True)
    assert "parent_tag" not in measured
    memory = (Path(measured["dir"]) / "memory.bin").stat().st_size
    assert 0 < measured["diff_physical_bytes"] < memory
    assert measured["diff_ms"] > 0

    await write("diff")
    diff = await call(forkd.branch_sandbox, sandbox, tag="diff", mode="diff")
    assert diff["parent_tag"] == "measured"
    assert diff["diff_physical_bytes"] == (Path(diff["dir"]) / "memory.bin").stat().st_size

    await write("older")
    older = await call(forkd.branch_sandbox, sandbox, tag="older", diff=True)
    assert older["parent_tag"] == "diff"

    await write("live")
    live = await call(forkd.branch_sandbox, sandbox, tag="live", mode="live")
    assert live["status"] == "ready"

    await write("later")
    later = await call(forkd.branch_sandbox, sandbox, tag="later", mode="live", wait=False)
    assert later["tag"] == "later"
    await until(lambda: not forked.engine.writing, "the live branch to be written")
    listed = {info["tag"]: info for info in await call(forkd.list_snapshots)}
    assert listed["later"]["status"] == "ready"
    assert listed["later"]["pause_ms"] > 0

    info = await call(forkd.get_sandbox, sandbox)
    assert (info["has_branched"], info["branch_count"]) == (True, 6)
    assert info["last_branch_memory_path"] == f"{listed['later']['dir']}/memory.bin"
    assert info["snapshot_tag"] == "base"

    for tag, state in ((full["tag"], "full"), ("diff", "diff"), ("later", "later")):
        (grandchild,) = await call(forkd.spawn_sandboxes, tag)
        done = await call(forkd.exec_command, grandchild["id"], ["cat", "/root/state"])
        assert done["stdout"] == f"{state}\n"
        await call(forkd.kill_sandbox, grandchild["id"])

    with pytest.raises(ControllerError) as refused:
        await call(forkd.delete_snapshot, "diff")
    assert (refused.value.status, "older" in str(refused.value.body)) == (409, True)
    await call(forkd.delete_snapshot, "later")
    with pytest.raises(ControllerError) as refused:
        await call(forkd.delete_snapshot, "later")
    assert refused.value.status == 404


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"mode": "diff", "diff": True}, 400),
        ({"mode": "full", "live": True}, 400),
        ({"diff": True, "live": True}, 400),
        ({"diff": True, "measure_diff": True}, 400),
        ({"mode": "live", "measure_diff": True}, 400),
        ({"wait": False}, 400),
        ({"mode": "diff", "wait": False}, 400),
        ({"mode": "diff", "parent_tag": "other"}, 400),
        ({"parent_tag": "base"}, 400),
        ({"mode": "live", "parent_tag": "base"}, 400),
        ({"tag": "no/tag"}, 400),
        ({"mode": "sideways"}, 422),
        ({"diff": 1}, 422),
        ({"tag": "base"}, 409),
        ({"mode": "diff", "tag": "base", "parent_tag": "base"}, 409),
    ],
)
async def test_branches_that_are_refused(
    shared_sandbox: str, served: Served, body: dict[str, object], status: int
) -> None:
    answer = await served.api.post(f"/v1/sandboxes/{shared_sandbox}/branch", json=body)
    assert answer.status_code == status, answer.text


async def test_a_parent_may_be_what_it_was_forked_from_or_its_last_branch(forked: Served) -> None:
    (sandbox,) = await forked.fork()

    async def branch(**body: object) -> httpx2.Response:
        return await forked.api.post(f"/v1/sandboxes/{sandbox}/branch", json=body)

    for tag, named, actual in (
        ("first", "base", "base"),
        ("second", "base", "first"),
        ("third", "second", "second"),
    ):
        answer = await branch(mode="diff", tag=tag, parent_tag=named)
        assert answer.json()["parent_tag"] == actual
    assert (await branch(mode="diff", parent_tag="first")).status_code == 400
