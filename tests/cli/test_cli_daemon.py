"""The command line and daemons: started, found, named, missing. No machine runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon_process import daemon
from ratoon import paths
from ratoon.store.snapshot.store import Store
from small_snapshots import publish

FOR_EVER = 120

Ratoon = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A store that has base, and L1 on it. A daemon that was started for it ends with the test."""
    store = Store.open(tmp_path / "home")
    publish(store, "L1", parent=publish(store, "base"))
    yield store.home
    if (lock := paths.daemon_lock(store.home)).exists() and lock.read_text():
        stop(int(lock.read_text()))


def stop(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + FOR_EVER
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the daemon does not end"
        time.sleep(0.05)


@pytest.fixture
def ratoon(home: Path) -> Ratoon:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("ratoon")
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RATOON_", "FORKD_"))
        }
        place = {"RATOON_HOME": str(home), "RATOON_RUNTIME": str(home.parent / "run")}
        return subprocess.run(
            [program, *arguments],
            env={**inherited, **place, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=FOR_EVER,
        )

    return run


def test_a_daemon_is_started_and_that_is_said_once(home: Path, ratoon: Ratoon) -> None:
    first = ratoon("ls", "--json")
    assert (first.returncode, json.loads(first.stdout)) == (0, [])
    pid = int(paths.daemon_lock(home).read_text())
    assert f"process {pid}" in first.stderr
    second = ratoon("ls", "--json")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    bare = ratoon("run", "base")
    assert (bare.returncode, bare.stdout) == (125, "")
    assert "which command" in bare.stderr
    absent = ratoon("run", "127.0.0.1:1/absent", "true")
    assert (absent.returncode, absent.stdout) == (125, "")
    assert "127.0.0.1:1/absent" in absent.stderr
    assert absent.stderr.rstrip().endswith("(HTTP 502)")
    for arguments in (
        ("kill", "sb-00000000-0000"),
        ("kill", "nobody"),
        ("top", "sb-00000000-0000"),
    ):
        missing = ratoon(*arguments)
        assert (missing.returncode, missing.stdout) == (3, "")
        assert arguments[1] in missing.stderr
    deleted = ratoon("rmi", "base")
    assert deleted.returncode == 4
    assert deleted.stderr.rstrip().endswith("(HTTP 409)")
    assert int(paths.daemon_lock(home).read_text()) == pid


def test_all_volumes_are_removed_that_can_be(ratoon: Ratoon) -> None:
    assert ratoon("volume", "create", "one", "two").returncode == 0
    done = ratoon("volume", "rm", "absent", "one", "gone", "two")
    assert done.returncode == 3
    for said in ("removed one", "removed two", "absent", "gone"):
        assert said in done.stderr
    assert "one" not in ratoon("volume", "ls").stdout


def test_a_file_that_is_not_called_one_is_pointed_out(
    ratoon: Ratoon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "127.0.0.1:1/here").mkdir(parents=True)
    (tmp_path / "127.0.0.1:1/tree.tar").touch()
    for kind, name in ("dir", "127.0.0.1:1/here"), ("tar", "127.0.0.1:1/tree.tar"):
        done = ratoon("run", name, "true")
        assert done.returncode == 125
        assert f"write {kind}:{name}" in done.stderr
    assert "write" not in ratoon("run", "127.0.0.1:1/absent", "true").stderr


def test_what_needs_no_daemon_starts_none(home: Path, ratoon: Ratoon) -> None:
    refused = ratoon("rmi", "base")
    assert refused.returncode == 4
    assert "HTTP" not in refused.stderr
    for arguments in (("rmi", "L1"), ("images",), ("tree",), ("kill",)):
        assert "daemon" not in ratoon(*arguments).stderr
    assert not paths.daemon_lock(home).exists()
    assert [entry["tag"] for entry in json.loads(ratoon("images", "--json").stdout)] == ["base"]


def test_a_daemon_that_was_named_is_the_one_that_is_asked(
    home: Path, ratoon: Ratoon, tmp_path: Path
) -> None:
    other = Store.open(tmp_path / "other")
    publish(other, "elsewhere")
    token = "0123456789abcdef"
    (tmp_path / "token").write_text(token)
    options = ("--bind", "127.0.0.1:0", "--token-file", str(tmp_path / "token"))
    with daemon(other.home, tmp_path / "r", *options) as named:
        for variables in ("RATOON_URL", "RATOON_TOKEN"), ("FORKD_URL", "FORKD_TOKEN"):
            environment = dict(zip(variables, (named.url, token), strict=True))
            listed = json.loads(ratoon("images", "--json", **environment).stdout)
            assert [entry["tag"] for entry in listed] == ["elsewhere"]
        wrong = {"RATOON_URL": "http://127.0.0.1:1", "RATOON_TOKEN": "wrong"}
        flags = ("--daemon-url", named.url, "--daemon-token", token)
        assert json.loads(ratoon("ls", "--json", *flags, **wrong).stdout) == []
        assert "elsewhere" in ratoon("snapshot-info", "elsewhere", *flags, **wrong).stdout
        refused = ratoon("ls", "--daemon-url", named.url)
        assert refused.returncode == 1
        assert "missing bearer token" in refused.stderr
        assert "(HTTP 401)" in refused.stderr
    gone = ratoon("ls", "--daemon-url", named.url)
    assert (gone.returncode, gone.stdout) == (1, "")
    assert "no daemon answers" in gone.stderr
    assert not paths.daemon_lock(home).exists()


def test_events_are_shown_until_the_daemon_ends(ratoon: Ratoon, home: Path, tmp_path: Path) -> None:
    with daemon(home, tmp_path / "r", "--bind", "127.0.0.1:0") as served:
        program = Path(sys.executable).with_name("ratoon")
        listening = subprocess.Popen(
            [program, "events", "--json", "--daemon-url", served.url],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert listening.stdout is not None
        with listening:
            # Whether it listens yet is not known, so there is something to tell until it does.
            line = ""
            deadline = time.monotonic() + FOR_EVER
            os.set_blocking(listening.stdout.fileno(), False)
            while not line and time.monotonic() < deadline:
                served.api.delete("/v1/snapshots/L1")
                publish_again(home)
                line = listening.stdout.readline()
            assert json.loads(line)["kind"] == "snapshot_deleted"
            served.stop()
            listening.stdout.close()
        assert listening.returncode in (0, 1)


def publish_again(home: Path) -> None:
    store = Store.open(home)
    publish(store, "L1", parent=store.get("base"))


def test_what_most_verbs_do_not_need_is_not_loaded(ratoon: Ratoon) -> None:
    """Each of these takes as long to load as a good part of a fork."""
    others = {"anyio", "email.message", "fastapi", "httpcore2", "httpx2", "importlib.metadata"}
    others |= {"numpy", "pydantic", "rich", "uvicorn", "websockets"}
    rooms = {"ratoon.api.files", "ratoon.api.upkeep", "ratoon.daemon", "ratoon.engine.sandbox"}
    ratoon("ls")  # starts the daemon
    for words in (("ls", "--quiet"), ("ls", "--json"), ("run", "tar:/absent")):
        asked = ratoon(*words, PYTHONPROFILEIMPORTTIME="1")
        loaded = {
            line.rpartition("|")[2].strip()
            for line in asked.stderr.splitlines()
            if line.startswith("import time:")
        }
        assert {"h11", "ratoon.client.aio.client"} <= loaded
        assert not loaded & (others | rooms), words
