"""`ratoon run IMAGE` as its users type it, with a daemon of its own, and through the library."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typist import PROGRAM, terminal
from vm_helpers import FOR_EVER, processes_of

import small_images
from daemon_process import daemon, environment
from oci_images import Layout, directory, layer
from ratoon import Client, paths
from ratoon.errors import NotHealthy

MACHINE = ("--mem-size-mib", "160", "--disk-size-mib", "256")
#: Answers on port 8000 with what $WHO is; the image's own command.
SERVE = "echo serving $WHO; echo $WHO >/srv/index.html; exec /bin/busybox httpd -f -p 8000 -h /srv"
UP = ("--health", "http://:8000/", "--health-interval", "0.1")
#: Is up at once, and ends with 5 as soon as there is a file /srv/end.
WAIT = ("sh", "-c", "echo up; until [ -e /srv/end ]; do sleep 0.1; done; exit 5")

EMBEDDED = """
import json, sys
from dataclasses import asdict
from ratoon import Client
with Client.embedded(sys.argv[1]) as client:
    with client.run_image(
        sys.argv[2], env={"WHO": "me"}, ram_mib=160, disk_size_mib=256, publish={8000: None},
        health="http://:8000/", health_interval=0.1,
    ) as sandbox:
        print(json.dumps({"run": asdict(sandbox.run)}))
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@dataclass(frozen=True)
class Place:
    """A daemon, and an image that it has not seen yet."""

    home: Path
    environment: dict[str, str]
    image: str
    url: str

    def start(self, *command: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> subprocess.Popen[str]:
        """`ratoon run` of the image with these options, and then `--` and a command, if any."""
        ours = arguments.index("--") if "--" in arguments else len(arguments)
        given = [*arguments[:ours], *MACHINE, self.image, *arguments[ours:]]
        return self.start(PROGRAM, "run", *given)

    def ratoon(self, *arguments: str) -> Done:
        return ended(self.start(PROGRAM, *arguments))

    def sandboxes(self) -> list[str]:
        return self.ratoon("ls", "-q").out.split()


def ended(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=FOR_EVER)
    return Done(process.returncode, out, err)


def answer(sandbox: dict[str, Any]) -> str:
    """What the image's server says to who asks it over a published port."""
    (port,) = sandbox["ports"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port['host_port']}/", timeout=60) as reply:
        return str(reply.read().decode().strip())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    room = tmp_path_factory.mktemp("images")
    layout = Layout(room / "image")
    entries = [*small_images.busybox(), directory("srv")]
    config = {"Cmd": ["sh", "-c", SERVE], "Env": ["WHO=nobody"], "StopSignal": "SIGUSR1"}
    layout.add([layer(entries)], config)
    for kind in ("guest", "packages", "accelerators"):
        (room / "cache" / kind).parent.mkdir(exist_ok=True)
        (room / "cache" / kind).symlink_to(paths.cache() / kind)
    home = room / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RATOON_CACHE", str(room / "cache"))
        patch.delenv("RATOON_RUNTIME", raising=False)
        runtime = paths.runtime(home)
        with daemon(home, runtime) as running:
            url = f"unix://{running.socket}"
            found = {**environment(home, runtime), "RATOON_URL": url, "TERM": "xterm"}
            yield Place(home, found, layout.reference(), url)
    assert processes_of(home, runtime) == []
    assert [*(home / "sandboxes").iterdir(), *(home / "staging").iterdir()] == []


@pytest.fixture(scope="module")
def first_runs(place: Place) -> Iterator[list[Done]]:
    """Equal runs of an unknown image: of two programs by one daemon, and of a third by itself."""
    wanted = ("-d", "--json", *UP, "-e", "WHO=me", "-p", "8000")
    processes = [
        place.run(*wanted),
        place.run(*wanted),
        place.start(sys.executable, "-c", EMBEDDED, place.home, place.image),
    ]
    yield [ended(each) for each in processes]
    place.ratoon("kill", "--all")
    place.ratoon("cache", "prune", "--all")
    assert place.ratoon("images", "--json").json == []


@pytest.fixture
def ready(place: Place, first_runs: list[Done]) -> Iterator[Place]:
    """The same, with both tiers of the image kept; the sandboxes that a test makes go with it."""
    before = place.sandboxes()
    yield place
    if left := [each for each in place.sandboxes() if each not in before]:
        assert place.ratoon("kill", *left).code == 0


def test_equal_first_runs_of_several_processes_build_once(
    place: Place, first_runs: list[Done]
) -> None:
    runs = [each.json["run"] for each in first_runs]
    assert sorted(each["tier"] for each in runs) == [0, 2, 2]
    assert sum("boot" in each["stages_ms"] for each in runs) == 1
    assert len({each["pid"] for each in runs}) == 1
    assert [answer(each.json) for each in first_runs[:2]] == ["me", "me"]
    starts = place.ratoon("cache", "ls", "--json").json
    assert sorted(each["tier"] for each in starts) == [1, 2]
    assert [each["unusable"] for each in starts] == [None, None]


def test_the_next_run_starts_where_it_was_up_and_another_one_does_not(ready: Place) -> None:
    again = ended(ready.run("-d", "--json", *UP, "-e", "WHO=me", "-p", "8000"))
    assert (again.json["run"]["tier"], again.json["run"]["missed"]) == (2, [])
    tag = again.json["snapshot_tag"]
    assert f"started from tier 2, {tag}, where it was up" in again.err
    assert answer(again.json) == "me"
    logs = ready.ratoon("logs", again.json["id"])
    assert logs.out == "serving me\n"
    other = ended(ready.run("-d", "--json", *UP, "-e", "WHO=you", "-p", "8000"))
    assert other.json["run"]["tier"] == 1
    assert "the booted image; tier 2: " in other.err
    assert "environment.WHO is me there, you here" in other.err
    assert answer(other.json) == "you"
    starts = ready.ratoon("cache", "ls", "--json").json
    keys = {each["document"].get("environment", {}).get("WHO"): each["key"] for each in starts}
    told = ready.ratoon("cache", "explain", keys["me"][:12], keys["you"][:12], "--json").json
    difference = {"field": "environment.WHO", "one": "me", "other": "you"}
    assert told == {"one": keys["me"], "other": keys["you"], "differences": [difference]}
    assert "environment.WHO" in ready.ratoon("cache", "explain", keys["you"][:12]).out
    assert ready.ratoon("cache", "explain", "0" * 64).code == 3
    # Whose snapshot is gone is shown as that, and goes itself.
    (lost,) = (each["snapshot_tag"] for each in starts if each["key"] == keys["you"])
    assert ready.ratoon("rmi", lost).code == 0
    listed = ready.ratoon("cache", "ls")
    assert f"cannot be used: its snapshot {lost} is gone" in listed.err
    (told,) = ready.ratoon("cache", "prune", "--dry-run", "--json").json
    assert (told["key"], told["snapshot_tag"]) == (keys["you"], lost)
    for option, said in (["--dry-run"], "1 would be removed"), ([], "1 were removed"):
        gone = ready.ratoon("cache", "prune", *option)
        assert lost in gone.out
        assert said in gone.err
    assert len(ready.ratoon("cache", "ls", "--json").json) == 2


def test_another_entrypoint(ready: Place) -> None:
    """The image's command is not for it; and an empty one is none."""
    before = ready.sandboxes()
    for entrypoint, command, said in (
        ("/bin/busybox", ("echo", "hi"), "hi\n"),
        ("pwd", (), "/srv\n"),
        ("", ("/bin/busybox", "echo", "alone"), "alone\n"),
    ):
        done = ended(ready.run("-w", "/srv", "--entrypoint", entrypoint, "--", *command))
        assert (done.code, done.out) == (0, said), done
    with (
        Client(ready.url) as client,
        client.run_image(
            ready.image, ["up"], entrypoint=["/bin/busybox", "echo"], ram_mib=160, disk_size_mib=256
        ) as sandbox,
    ):
        assert sandbox.run is not None
        assert sandbox.run.argv == ["/bin/busybox", "echo", "up"]
    assert ready.sandboxes() == before


def test_a_command_ends_as_itself(ready: Place) -> None:
    before = ready.sandboxes()
    said = ended(ready.run("-e", "WHO=you", "--", "sh", "-c", "echo $WHO; echo bad >&2; exit 7"))
    assert (said.code, said.out) == (7, "you\n")
    assert said.err.endswith("\nbad\n")
    ends = ("--", "sh", "-c", "kill -TERM $$; exit 8")
    assert ended(ready.run("--init", *ends)).code == 128 + signal.SIGTERM
    assert ended(ready.run(*ends)).code == 8  # process 1 is told of it, and has no handler
    assert ended(ready.run("--", "no-such-program")).code == 127
    early = ended(ready.run("--health-log", "up", "--", "sh", "-c", "echo no; exit 3"))
    assert early.code == 125
    assert "sh ended before it was healthy: it exited with 3" in early.err
    late = ended(ready.run("--health-cmd", "false", "--health-within", "0.3", "--", *WAIT))
    assert (late.code, "was not healthy within 0.3 s" in late.err) == (125, True)
    both = ended(ready.run("--health-cmd", "true", "--health-log", "up", "--", *WAIT))
    assert (both.code, "more than one health check" in both.err) == (125, True)
    assert ready.sandboxes() == before


@pytest.mark.parametrize("health", [("--health-log", "^up$"), ("--health-cmd", "test -d /srv")])
def test_what_was_up_is_followed_to_its_end(ready: Place, health: tuple[str, str]) -> None:
    """From either tier its output is shown, and how it ends is how the program does."""
    before = ready.sandboxes()
    for tier in (1, 2):
        running = ready.run(*health, "--name", "followed", "--", *WAIT)
        assert running.stdout is not None
        assert running.stdout.readline() == "up\n"
        ready.ratoon("exec", "followed", "touch", "/srv/end")  # which may end before it answers
        done = ended(running)
        assert done.code == 5
        assert f"started from tier {tier}" in done.err
    assert ready.sandboxes() == before


#: Says in its exit code by which signal it was asked to end.
ASKED = "trap 'exit 3' USR1; trap 'exit 4' TERM; echo up; while :; do sleep 0.1; done"


def test_it_is_stopped_as_the_image_wants_it(ready: Place) -> None:
    up = "-d", "--health-log", "^up$"
    for options, tier, code in ((), 1, 3), ((), 2, 3), (("--stop-signal", "TERM"), 2, 4):
        made = ended(ready.run(*up, *options, "--", "sh", "-c", ASKED))
        assert f"started from tier {tier}" in made.err
        sandbox = made.out.strip()
        fork = ready.ratoon("fork", sandbox).out.strip()
        for each in sandbox, fork:
            stopped = ready.ratoon("stop", each)
            assert stopped.err == f"stopped {each}: exited ({code})\n"


def test_who_is_interrupted_leaves_no_sandbox(ready: Place) -> None:
    before = ready.sandboxes()
    running = ready.run("--health-log", "^up$", "--", *WAIT)
    assert running.stdout is not None
    assert running.stdout.readline() == "up\n"
    running.send_signal(signal.SIGINT)
    assert ended(running).code == 130
    assert ready.sandboxes() == before


async def test_a_shell_of_an_image_on_a_terminal(ready: Place) -> None:
    before = ready.sandboxes()
    arguments = "run", "-it", "-e", "WHO=you", *MACHINE, ready.image, "sh"
    async with terminal(ready.environment, *arguments) as typist:
        await typist.see(b"started from tier 1")
        await typist.see(b"# ")
        typist.type(b"echo $WHO is $(stty size)\r")
        await typist.see(b"you is 30 100")
        typist.type(b"exit 7\r")
        assert await typist.end() == 7
    assert ready.sandboxes() == before


def test_without_the_cache_and_anew(ready: Place) -> None:
    kept = ready.ratoon("cache", "ls", "--json").json
    before = [each["snapshot_tag"] for each in kept]
    alone = ended(ready.run("--json", "--no-cache", "--", "sh", "-c", "exit 6"))
    assert (alone.code, json.loads(alone.out)["run"]["tier"]) == (6, 0)
    assert "nothing that was kept was to be used" in alone.err
    assert ready.ratoon("cache", "ls", "--json").json == kept
    assert len(ready.ratoon("images", "--json").json) == len(before)
    anew = ended(ready.run("-d", "--json", "--refresh", *UP, "-e", "WHO=me", "-p", "8000"))
    assert anew.json["run"]["tier"] == 0
    assert "it is to be made anew" in anew.err
    assert answer(anew.json) == "me"
    made = {each["key"]: each for each in ready.ratoon("cache", "ls", "--json").json}
    assert set(made) == {each["key"] for each in kept}
    remade = [each for each in kept if made[each["key"]] != each]
    assert {each["tier"] for each in remade} == {1, 2}
    again = ended(ready.run("-d", "--json", *UP, "-e", "WHO=me", "-p", "8000"))
    assert (again.json["run"]["tier"], answer(again.json)) == (2, "me")


def test_the_library(ready: Place) -> None:
    machine: dict[str, Any] = {"ram_mib": 160, "disk_size_mib": 256}
    with Client(ready.url) as client:
        sandboxes = len(client.sandboxes())
        wanted = {**machine, "env": {"WHO": "library"}, "health_log": "^serving library$"}
        for tier in (1, 2):
            with client.run_image(ready.image, **wanted) as sandbox:
                assert sandbox.run is not None
                assert sandbox.run.tier == tier
                assert sandbox.run.argv == ["sh", "-c", SERVE]
                assert sandbox.run.pid is not None
                running = sandbox.commands.connect(sandbox.run.pid)
                sandbox.commands.signal(sandbox.run.pid, signal.SIGKILL)
                ended = running.wait(check=False)
                assert (ended.exit_code, ended.stdout) == (137, "serving library\n")
        with pytest.raises(NotHealthy, match=r"(?s)exited with 3.*too bad"):
            client.run_image(ready.image, "echo too bad; exit 3", health_cmd="false", **machine)
        with client.run_image(ready.image, ["true"], start=False, **machine) as sandbox:
            assert sandbox.run is not None
            assert (sandbox.run.pid, sandbox.commands.list()) == (None, [])
        assert len(client.sandboxes()) == sandboxes
        (made,) = (each for each in client.starts.list() if "library" in str(each.document))
        assert (made.tier, made.image, made.command[:2]) == (2, ready.image, ["sh", "-c"])
        assert "environment.WHO" in {
            each.field for each in client.starts.explain(made.key[:20]).differences
        }
        gone = client.starts.prune(everything=True, dry_run=True)
        assert made.snapshot_tag in {each.snapshot_tag for each in gone}
        assert made.key in {each.key for each in client.starts.list()}
