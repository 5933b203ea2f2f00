"""The command line on real machines: what its users type, and what they see."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import termios
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from served_daemon import Served
from typist import PROGRAM, terminal
from vm_helpers import FOR_EVER, sh, until

from ratoon.api.answers import CommandEnd
from ratoon.machine.guest import commands
from ratoon.units import MIB

pytest_plugins = ["daemon_plugin"]


@dataclass(frozen=True)
class Done:
    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()


Ratoon = Callable[..., Coroutine[Any, Any, Done]]


def environment(served: Served) -> dict[str, str]:
    return {**os.environ, "RATOON_URL": f"unix://{served.socket}", "TERM": "xterm"}


async def start(served: Served, *arguments: str) -> Process:
    return await asyncio.create_subprocess_exec(
        PROGRAM, *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment(served)
    )


@pytest.fixture
def ratoon(forked: Served) -> Ratoon:
    async def run(*arguments: str, stdin: bytes = b"") -> Done:
        process = await start(forked, *arguments)
        out, err = await asyncio.wait_for(process.communicate(stdin), FOR_EVER)
        assert process.returncode is not None
        return Done(process.returncode, out, err.decode())

    return run


async def test_run_is_the_command_in_a_sandbox_of_its_own(ratoon: Ratoon, forked: Served) -> None:
    before = forked.engine.sandboxes
    done = await ratoon("run", "base", "sh", "-c", "echo out; printf '\\377'; echo err >&2; exit 3")
    assert (done.code, done.out, done.err) == (3, b"out\n\xff", "err\n")
    data = bytes(range(256)) * (4 * MIB // 256)
    done = await ratoon("run", "-i", "base", "cat", stdin=data)
    assert (done.code, done.out) == (0, data)
    done = await ratoon("run", "-e", "A=1", "-w", "/usr", "-u", "nobody", "base", "--", *ASK)
    assert done.text == "1 /usr nobody\n"
    missing = await ratoon("run", "base", "no-such-program")
    assert (missing.code, missing.out) == (127, b"")
    assert "no-such-program" in missing.err
    slow = await ratoon("run", "--timeout-secs", "0.5", "base", "sleep", "1000")
    assert slow.code == 124
    assert "too long" in slow.err
    as_json = json.loads((await ratoon("run", "--json", "base", "echo", "hi")).out)
    assert (as_json["exit_code"], as_json["stdout"]) == (0, "hi\n")
    assert "fork" in as_json["stages_ms"]
    assert forked.engine.sandboxes == before


ASK = ("sh", "-c", "echo $A $(pwd) $(id -un)")


async def test_a_sandbox_from_run_to_kill(ratoon: Ratoon) -> None:
    sandbox = (await ratoon("run", "-d", "--name", "web", "-l", "a=b", "base")).text.strip()
    taken = await ratoon("run", "-d", "--name", "web", "base")
    assert taken.code == 125
    assert sandbox in taken.err
    (listed,) = json.loads((await ratoon("ls", "--json", "-l", "a=b")).out)
    assert (listed["id"], listed["metadata"]) == (sandbox, {"a": "b", "name": "web"})
    assert sandbox in (await ratoon("ps")).text
    assert (await ratoon("exec", "web", "hostname")).text == f"{sandbox}\n"
    assert (await ratoon("exec", sandbox, "sh", "-c", "exit 7")).code == 7
    forks = (await ratoon("fork", "web", "-n", "2")).text.split()
    assert len({*forks, sandbox}) == 3
    for verb, state in (("standby", "standby"), ("resume", "running")):
        assert (await ratoon(verb, "web", forks[0])).code == 0
        listed = json.loads((await ratoon("ls", "--json", "--state", state)).out)
        assert {sandbox, forks[0]} <= {each["id"] for each in listed}
    await ratoon("exec", "web", "touch", "/root/made")
    assert (await ratoon("reset", "web")).code == 0
    assert (await ratoon("exec", "web", "ls", "/root/made")).code == 2
    assert (await ratoon("kill", *forks, "absent")).code == 3
    assert (await ratoon("kill", "web")).code == 0
    assert json.loads((await ratoon("ls", "--json")).out) == []
    spawned = (await ratoon("spawn", "--tag", "base", "-n", "2", "--ttl", "10m")).text.split()
    assert len(spawned) == 2
    assert (await ratoon("kill", "--tag", "base")).code == 0
    assert (await ratoon("ls", "-q")).out == b""


async def test_all_about_one(ratoon: Ratoon) -> None:
    """A sandbox, by its name or id, or a snapshot; without what a terminal would obey."""
    named = ("--name", "web", "-l", "what=\x1b[31m")
    sandbox = (await ratoon("run", "-d", *named, "base", "sleep", "1000")).text.strip()
    found = json.loads((await ratoon("inspect", "web", "--json")).out)
    assert (found["id"], found["snapshot_tag"], found["state"]) == (sandbox, "base", "running")
    assert found == json.loads((await ratoon("inspect", sandbox, "--json")).out) | {
        "idle_for_seconds": found["idle_for_seconds"]
    }
    assert {*found["layers"].values()} == {True}
    shown = (await ratoon("inspect", "web")).text
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert lines["id"] == [sandbox]
    assert lines["layers.user"] == ["yes"]
    assert lines["volumes"] == ["-"]
    assert lines["metadata.what"] == ["\\x1b[31m"]
    await ratoon("standby", "web")
    assert json.loads((await ratoon("inspect", "web", "--json")).out)["layers"] is None
    await ratoon("kill", "web")
    snapshot = json.loads((await ratoon("inspect", "base", "--json")).out)
    assert (snapshot["tag"], snapshot["chain_depth"]) == ("base", 0)
    gone = await ratoon("inspect", "web")
    assert (gone.code, gone.err) == (3, "ratoon: no sandbox and no snapshot is called web\n")


async def test_snapshots_are_made_of_sandboxes(ratoon: Ratoon) -> None:
    command = "sh -c 'echo 42 >/root/answer; sync'"
    made = await ratoon("snapshot-diff", "--from", "base", "--tag", "cli-a", "--exec", command)
    assert made.text.startswith("cli-a: depth 1, ")
    failed = await ratoon("snapshot-diff", "--from", "base", "--tag", "cli-b", "--exec", "false")
    assert (failed.code, failed.out) == (1, b"")
    assert "cli-b was not made" in failed.err
    taken = await ratoon("snapshot-diff", "--from", "base", "--tag", "cli-a", "--exec", "true")
    assert taken.code == 4
    sandbox = (await ratoon("run", "-d", "cli-a")).text.strip()
    await ratoon("snapshot", "--tag", "cli-full", "--from-sandbox", sandbox)
    await ratoon("snapshot", "--tag", "cli-live", "--from-sandbox", sandbox, "--live")
    images = {each["tag"]: each for each in json.loads((await ratoon("images", "--json")).out)}
    assert (images["cli-full"]["chain_depth"], images["cli-live"]["parent_tag"]) == (0, "cli-full")
    assert (await ratoon("run", "cli-live", "cat", "/root/answer")).text == "42\n"
    detail = json.loads((await ratoon("snapshot-info", "cli-a", "--json")).out)
    assert detail["ancestors"] == ["base"]
    compact = await ratoon("snapshot-compact", "--from", "cli-a", "--to", "cli-flat")
    assert "depth 0" in compact.text
    gone = await ratoon("rmi", "cli-flat", "cli-a", "--force")
    assert gone.err.splitlines() == ["deleted cli-flat", "deleted cli-a"]


async def test_files_are_copied(ratoon: Ratoon, tmp_path: Path) -> None:
    sandbox = (await ratoon("run", "-d", "base")).text.strip()
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/file").write_text("content")
    assert (await ratoon("cp", str(tree), f"{sandbox}:/root/new")).code == 0
    assert (await ratoon("cp", str(tree), f"{sandbox}:/root/new")).code == 0
    assert (await ratoon("cp", f"{tree}/.", f"{sandbox}:/root/new")).code == 0
    found = await ratoon("exec", sandbox, "sh", "-c", "cd /root/new && find . -type f | sort")
    assert found.text == "./sub/file\n./tree/sub/file\n"
    await ratoon("cp", f"{sandbox}:/root/new", str(tmp_path))
    assert (tmp_path / "new/tree/sub/file").read_text() == "content"
    await ratoon("cp", f"{sandbox}:/root/new/sub/file", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_text() == "content"
    absent = await ratoon("cp", f"{sandbox}:/absent", str(tmp_path / "x"))
    assert absent.code == 3
    assert "/absent" in absent.err
    assert (await ratoon("cp", "a", "b")).code == 2


async def test_what_runs_in_the_background(ratoon: Ratoon) -> None:
    sandbox = (await ratoon("run", "-d", "base", "sh", "-c", "echo begun; cat")).text.strip()
    while not (logs := await ratoon("logs", sandbox)).out:
        pass
    assert (logs.code, logs.text) == (0, "begun\n")
    pid = int((await ratoon("exec", "-d", "-i", sandbox, "cat")).text)
    top = json.loads((await ratoon("top", "--json", sandbox)).out)
    assert [each["background"] for each in top if each["pid"] == pid] == [True]
    attached = await ratoon("attach", sandbox, str(pid), stdin=b"typed\n")
    assert (attached.code, attached.out) == (0, b"typed\n")
    assert (await ratoon("logs", sandbox, "99999")).code == 3
    assert (await ratoon("eval", sandbox, "x = 6\nprint('hi')\nx * 7")).text == "hi\n42\n"
    failed = await ratoon("eval", sandbox, stdin=b"x / 0")
    assert failed.code == 1
    assert "ZeroDivisionError" in failed.err
    assert (await ratoon("port", sandbox, "8000")).text.endswith("-> 8000\n")
    (port,) = json.loads((await ratoon("port", "--json", sandbox)).out)
    assert port["guest_port"] == 8000
    elsewhere = (await ratoon("port", sandbox, "127.0.0.2::8000")).text
    assert elsewhere.startswith("127.0.0.2:")
    assert elsewhere.partition(" ")[0] + ":8000" in " ".join((await ratoon("ls")).text.split())
    assert (await ratoon("port", sandbox, "53/udp")).code == 2
    assert (await ratoon("port", sandbox, "--close", "8000")).code == 0
    assert (await ratoon("port", sandbox)).out == b""


async def test_the_end_of_what_runs_in_the_background(ratoon: Ratoon, forked: Served) -> None:
    script = "until [ -e /tmp/end ]; do sleep 0.05; done; exit 42"
    run = "run", "-d", "--stop-signal", "INT"
    first = (await ratoon(*run, "--name", "first", "base", "sh", "-c", script)).text.strip()
    told = json.loads((await ratoon(*run, "--json", "--rm", "base", "sh", "-c", script)).out)
    second = told["id"]
    assert (told["auto_remove"], told["command"]["ended"]) == (True, None)
    bare = (await ratoon("run", "-d", "base")).text.strip()
    waiting = [
        asyncio.create_task(ratoon("wait", *names))
        for names in (["first", second], ["--json", second, "first"], [bare, "first"])
    ]
    await until(lambda: are_waited_for(forked, 5), "who waits")
    for each in first, second:
        assert (await ratoon("exec", each, "touch", "/tmp/end")).code == 0
    both, as_json, one = [await each for each in waiting]
    assert (both.code, both.text) == (0, "42\n42\n")
    ended = {"exit_code": 42, "reason": None}
    assert json.loads(as_json.text) == [{"sandbox": id_, **ended} for id_ in (second, first)]
    assert (one.code, one.text) == (4, "42\n")
    assert f"sandbox {bare} has no command" in one.err
    assert f"{first}  first" in (listed := (await ratoon("ls")).text)
    assert "exited (42)" in listed
    async with asyncio.timeout(FOR_EVER):
        while second in (await ratoon("ls", "-q")).text.split():
            pass
    assert (await ratoon("wait", second)).code == 3
    assert (await ratoon("exec", "first", "true")).code == 0
    assert (await ratoon("stop", "first", bare)).code == 0
    assert (await ratoon("ls", "-q")).text == ""
    assert (await ratoon("run", "--stop-signal", "BAD", "base", "true")).code == 125


def are_waited_for(served: Served, count: int) -> bool:
    return len(served.engine.events._listeners) >= count


async def test_stop(ratoon: Ratoon, forked: Served) -> None:
    heeds = "trap 'exit 3' TERM; touch /tmp/begun; while :; do sleep 0.05; done"
    ignores = "trap '' TERM; touch /tmp/begun; while :; do sleep 0.05; done"
    made = [
        (await ratoon("run", "-d", "base", "sh", "-c", each)).text.strip()
        for each in (heeds, ignores)
    ]
    for each in made:
        await ratoon("exec", each, "sh", "-c", "until [ -e /tmp/begun ]; do sleep 0.05; done")
    waiting = asyncio.create_task(ratoon("wait", *made))
    await until(lambda: are_waited_for(forked, 2), "who waits")
    assert (await ratoon("stop", made[0])).err == f"stopped {made[0]}: exited (3)\n"
    assert (await ratoon("stop", "--time", "1", made[1])).err == f"stopped {made[1]}\n"
    assert (await waiting).text == "3\n137\n"


async def test_a_stop_that_is_interrupted_goes_on(ratoon: Ratoon, forked: Served) -> None:
    script = "trap 'touch /tmp/told' TERM; until [ -e /tmp/end ]; do sleep 0.05; done; exit 3"
    name = (await ratoon("run", "-d", "base", "sh", "-c", script)).text.strip()
    waiting = asyncio.create_task(forked.engine.get(name).wait())
    process = await start(forked, "stop", "--time", "10m", name)
    await ratoon("exec", name, "sh", "-c", "until [ -e /tmp/told ]; do sleep 0.05; done")
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), FOR_EVER) == 130
    assert (await ratoon("exec", name, "touch", "/tmp/end")).code == 0
    assert (await waiting).ended == CommandEnd(3)
    async with asyncio.timeout(FOR_EVER):
        while name in {each.id for each in forked.engine.sandboxes}:
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_who_is_interrupted_leaves_no_sandbox(forked: Served, number: int) -> None:
    before = forked.engine.sandboxes
    # exec: a child that a shell has just forked may take a signal for the shell's, and live on.
    process = await start(forked, "run", "base", "sh", "-c", "echo begun; exec sleep 1000")
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), FOR_EVER) == b"begun\n"
    process.send_signal(number)
    code = 130 if number == signal.SIGHUP else 128 + number  # its own: it was told, and ended
    assert await asyncio.wait_for(process.wait(), FOR_EVER) == code
    assert forked.engine.sandboxes == before


async def test_exec_has_what_the_sandbox_was_made_with(ratoon: Ratoon, forked: Served) -> None:
    made = "-e", "A=1", "-e", "B=2", "-w", "/usr", "-u", "nobody"
    sandbox = (await ratoon("run", "-d", *made, "base", "sleep", "1000")).text.strip()
    other = "-e", "A=3", "-w", "/srv", "-u", "root"
    assert (await ratoon("exec", *other, sandbox, *ASK)).text == "3 /srv root\n"
    assert (await ratoon("exec", sandbox, *ASK)).text == "1 /usr nobody\n"
    assert (await ratoon("exec", sandbox, "sh", "-c", "echo $B $PATH")).text.startswith("2 /usr/")
    assert (await ratoon("snapshot", "--from-sandbox", sandbox, "--tag", "made-with")).code == 0
    assert (await ratoon("run", "made-with", *ASK)).text == "1 /usr nobody\n"
    assert (await ratoon("reset", sandbox)).code == 0
    assert (await ratoon("exec", sandbox, *ASK)).text == "1 /usr nobody\n"
    for verb in ("spawn", "--tag"), ("run", "-d"):  # without a command
        bare = (await ratoon(*verb[:1], *made, *verb[1:], "base")).text.strip()
        assert (await ratoon("exec", bare, *ASK)).text == "1 /usr nobody\n"
        assert (await ratoon("kill", bare)).code == 0
    assert (await ratoon("kill", sandbox)).code == 0


async def test_what_is_copied_is_of_who_runs_commands(ratoon: Ratoon, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").touch()
    sandbox = (await ratoon("run", "-d", "-u", "nobody", "base", "sleep", "1000")).text.strip()
    for source in "tree", "tree/file":
        for user, whose in ((), "nobody nogroup"), (("-u", "daemon:games"), "daemon games"):
            target = f"/srv/{whose.split()[0]}-{source.replace('/', '-')}"
            copied = await ratoon("cp", *user, str(tmp_path / source), f"{sandbox}:{target}")
            assert copied.code == 0, copied
            found = await ratoon("exec", sandbox, "find", target, "-printf", "%u %g\\n")
            assert set(found.text.splitlines()) == {whose}
    refused = await ratoon("cp", "-u", "daemon", f"{sandbox}:/srv", str(tmp_path / "out"))
    assert (refused.code, "whoever copies it" in refused.err) == (2, True)
    assert (await ratoon("kill", sandbox)).code == 0


#: Says what it hears, and goes on.
STUBBORN = "trap 'echo INT' INT; trap 'echo TERM' TERM; echo begun; while :; do sleep 0.1; done"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["run", "exec", "attach"])
async def test_a_signal_is_the_commands_and_the_second_ends_the_client(
    forked: Served, ratoon: Ratoon, verb: str, number: signal.Signals
) -> None:
    before = forked.engine.sandboxes
    async with await forked.engine.fork_one("base") as sandbox:
        arguments = [verb, "base" if verb == "run" else sandbox.id, "sh", "-c", STUBBORN]
        if verb == "attach":
            assert (await ratoon("exec", "-d", *arguments[1:])).code == 0
            del arguments[2:]
        process = await start(forked, *arguments)
        assert process.stdout is not None
        for said in (b"begun\n", f"{number.name[3:]}\n".encode()):
            assert await asyncio.wait_for(process.stdout.readline(), FOR_EVER) == said
            process.send_signal(number)
        assert await asyncio.wait_for(process.wait(), FOR_EVER) == 130
        async with asyncio.timeout(FOR_EVER):
            while len(await commands.processes(sandbox)) != (verb == "attach"):
                await asyncio.sleep(0.1)
    assert forked.engine.sandboxes == before


async def test_a_signal_is_the_commands_whose_answer_is_json(forked: Served) -> None:
    script = "trap 'echo told; exit 7' TERM; >/tmp/begun; while :; do sleep 0.1; done"
    async with await forked.engine.fork_one("base") as sandbox:
        process = await start(forked, "exec", "--json", sandbox.id, "sh", "-c", script)
        await sh(sandbox, "until [ -e /tmp/begun ]; do sleep 0.05; done")
        process.send_signal(signal.SIGTERM)
        out, _ = await asyncio.wait_for(process.communicate(), FOR_EVER)
    answer = json.loads(out)
    assert (process.returncode, answer["exit_code"], answer["stdout"]) == (7, 7, "told\n")


# On a terminal ------------------------------------------------------------------------------------


async def test_a_shell_on_a_terminal(forked: Served) -> None:
    before = forked.engine.sandboxes
    async with terminal(environment(forked), "run", "-it", "base", "sh") as typist:
        await typist.see(b"# ")
        typist.type(b"stty size; echo $TERM\r")
        await typist.see(b"30 100")
        await typist.see(b"xterm")
        # Only what says itself that it runs is sure to be what the keys interrupt.
        typist.type(b"sh -c 'echo run''ning; exec sleep 1000'\r")
        await typist.see(b"running")
        typist.type(b"\x03")  # goes to the shell, and ends what it runs
        await typist.see(b"# ")
        typist.type(b"exit 7\r")
        assert await typist.end() == 7
    assert forked.engine.sandboxes == before


async def test_a_terminal_changes_its_size(forked: Served) -> None:
    async with terminal(environment(forked), "run", "-it", "base") as typist:
        await typist.see(b"# ")
        # Not a trap: a shell that is told just before it reads runs it only after the next line.
        wait = b"until [ \"$(stty size)\" = '40 120' ]; do sleep 0.1; done"
        typist.type(b"echo re''ady; " + wait + b"; echo chan''ged\r")
        await typist.see(b"ready")
        termios.tcsetwinsize(typist._keyboard, (40, 120))
        typist.process.send_signal(signal.SIGWINCH)  # no terminal of its own session tells it
        await typist.see(b"changed")
        typist.type(b"exit\r")
        assert await typist.end() == 0


async def test_detaching_leaves_all_running(ratoon: Ratoon, forked: Served) -> None:
    before = {each.id for each in forked.engine.sandboxes}
    async with terminal(environment(forked), "run", "-it", "base", "sh") as typist:
        await typist.see(b"# ")
        typist.type(b"here=there\r")
        await typist.see(b"# ")
        typist.type(b"\x10\x11")
        await typist.see(b"ratoon attach ")
        assert await typist.end() == 0
    (sandbox,) = {each.id for each in forked.engine.sandboxes} - before
    async with terminal(environment(forked), "attach", sandbox) as typist:
        typist.type(b"echo $here again\r")
        await typist.see(b"there again")
        typist.type(b"exit 3\r")
        assert await typist.end() == 3


async def test_a_terminal_that_is_not_one(ratoon: Ratoon) -> None:
    refused = await ratoon("run", "-it", "base", "sh")
    assert refused.code == 125
    assert "not a terminal" in refused.err
