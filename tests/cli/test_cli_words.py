"""What options say, what keys do, and what the program loads before it knows its verb."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from ratoon.cli.app import app
from ratoon.cli.options import fork_options, mebibytes, pair, published, seconds, variable
from ratoon.cli.showing import age, printable
from ratoon.cli.terminal import DETACH, Keys
from ratoon.cli.verbs import VERBS
from ratoon.engine.sandbox.base import DISK_BYTES, RAM_BYTES
from ratoon.engine.startup.spec import LogHealth
from ratoon.store.snapshot.store import Store
from ratoon.units import MIB
from small_snapshots import publish


def test_times_and_sizes() -> None:
    assert [seconds(text) for text in ("90", "90s", "1.5m", "2h", "1d")] == [
        90,
        90,
        90,
        7200,
        86400,
    ]
    assert [mebibytes(text) for text in ("512", "512m", "2g", "0.5G")] == [512, 512, 2048, 512]
    for text in ("", "s", "-1", "1w", "1 2", "0x10", "infinity", "nan"):
        with pytest.raises(typer.BadParameter, match="15m"):
            seconds(text)
        with pytest.raises(typer.BadParameter, match="write MiB, or a number with K, M, G"):
            mebibytes(text)


def test_ports_and_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert published("80") == (80, None)
    assert published("8080:80") == (80, 8080)
    assert published("8080:80/tcp") == (80, 8080)
    assert published("192.0.2.1:8080:80") == (80, ("192.0.2.1", 8080))
    assert published("[::1]::80") == (80, ("::1", None))
    for text in ("", "a", "80:", ":80", "::80", ":8080:80", "::1:8080:80", "[::1]:80"):
        with pytest.raises(typer.BadParameter, match="HOSTPORT:GUESTPORT"):
            published(text)
    with pytest.raises(typer.BadParameter, match="TCP ports can be published, udp ones cannot"):
        published("53:53/udp")
    assert pair("a=b=c") == ("a", "b=c")
    with pytest.raises(typer.BadParameter, match="NAME=VALUE"):
        pair("=b")
    monkeypatch.setenv("HERE", "there")
    assert [variable(text) for text in ("A=1", "A=", "HERE", "NOT_HERE")] == [
        *(("A", "1"), ("A", ""), ("HERE", "there"), ("NOT_HERE", "")),
    ]


def test_options_that_are_not_given_are_not_passed_on() -> None:
    assert fork_options() == {}
    ports = [(80, None), (80, ("::1", 8080)), (443, 8443)]
    given = fork_options(memory=512, ttl=60, publish=ports, label=[("a", "b")])
    assert given == {
        "memory_mib": 512,
        "timeout": 60,
        "publish": {80: [None, ("::1", 8080)], 443: [8443]},
        "metadata": {"a": "b"},
    }


def test_what_people_are_shown() -> None:
    assert [age(each) for each in (-1, 5, 119, 7200, 200_000)] == ["0s", "5s", "2m", "2h", "2d"]
    assert printable("a\x1b[31m\nb") == "a\\x1b[31m\\nb"


# Keys ---------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=5) | st.sampled_from([DETACH[:1], DETACH[1:], b"x"])))
def test_the_keys_to_detach_are_found_however_they_arrive(pieces: list[bytes]) -> None:
    typed = b"".join(pieces)
    keys, passed, found = Keys(), b"", False
    for piece in pieces:
        more, found = keys.typed(piece)
        passed += more
        if found:
            break
    before, keys_typed, _ = typed.partition(DETACH)
    assert found == bool(keys_typed)
    if found:
        assert passed == before
    else:
        held_back = DETACH[:1] if typed.endswith(DETACH[:1]) else b""
        assert passed + held_back == typed


# Verbs --------------------------------------------------------------------------------------------


def test_each_verb_is_where_the_table_says_and_does_what_it_says() -> None:
    for verb in VERBS.values():
        import_module(f"ratoon.cli.{verb.module}")
    registered = {each.name: each for each in app.registered_commands}
    assert registered.keys() == VERBS.keys()
    for name, verb in VERBS.items():
        callback = registered[name].callback
        assert callback is not None
        assert (callback.__doc__ or "").splitlines()[0] == verb.help, name
        assert callback.__module__ in (f"ratoon.cli.{verb.module}", "ratoon.cli.connect"), name


@pytest.mark.parametrize("verb", ["from-image", "run"])
def test_the_defaults_that_help_names_are_the_engines(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ratoon", verb, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    defaults = [f"{RAM_BYTES // MIB}", f"{DISK_BYTES // MIB}"]
    if verb == "run":
        health = LogHealth(pattern="up")
        times = (health.interval_seconds, health.timeout_seconds, health.within_seconds)
        defaults += [f"{time:g}s" for time in times]
    for default in defaults:
        assert f" {default} if not said" in " ".join(done.stdout.split())


def complete(*words: str, **environment: str) -> list[str]:
    """What the shell is offered for the last of these words."""
    asked = {
        "COMP_WORDS": " ".join(("ratoon", *words)),
        "COMP_CWORD": str(len(words)),
        "_RATOON_COMPLETE": "complete_bash",
    }
    program = Path(sys.executable).with_name("ratoon")
    inherited = {name: value for name, value in os.environ.items() if name != "RATOON_URL"}
    done = subprocess.run(
        [program],
        env={**inherited, **asked, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_shell_completes_verbs_tags_and_ids(tmp_path: Path) -> None:
    for name in ("snapshots/base", "snapshots/basil", "snapshots/tools", "sandboxes/sb-1"):
        (tmp_path / name).mkdir(parents=True)
    home = str(tmp_path)
    assert complete("snapshot-") == ["snapshot-diff", "snapshot-compact", "snapshot-info"]
    assert complete("run", "bas", RATOON_HOME=home) == ["base", "basil"]
    assert complete("kill", "sb", RATOON_HOME=home) == ["sb-1"]
    assert complete("kill", "sb", RATOON_HOME=home, RATOON_URL="http://elsewhere") == []


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_it_starts_without_what_it_does_not_need(option: str) -> None:
    script = (
        "import sys\n"
        f"sys.argv = ['ratoon', '{option}']\n"
        "from ratoon.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = {'asyncio', 'fastapi', 'httpx2', 'numpy', 'pydantic', 'rich', 'websockets'}\n"
        "print('loaded:', sorted(heavy & {*sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("loaded: []\n")


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["no-such-verb"], 2)])
def test_its_end_is_at_once_and_loses_nothing(words: list[str], code: int) -> None:
    script = (
        "import atexit, sys\n"
        "from ratoon.cli import program\n"
        "atexit.register(print, 'taken apart')\n"
        f"sys.argv = ['ratoon', *{words}]\n"
        "program()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stdout + done.stderr
    assert "taken apart" not in done.stdout


def test_what_cannot_be_written_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ratoon", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode
    assert "No space left" in done.stderr


def test_snapshots_are_shown_without_numpy(tmp_path: Path) -> None:
    publish(Store.open(tmp_path / "home"), "base")
    environment = {**os.environ, "RATOON_HOME": str(tmp_path / "home")}
    environment.pop("RATOON_URL", None)
    for words in (["images"], ["snapshot-info", "base"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "ratoon", *words],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "base" in done.stdout
        assert "ratoon.store.snapshot.store" in done.stderr
        assert "numpy" not in done.stderr
