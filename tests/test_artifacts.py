"""Artifacts: built once, published whole, named after what they are made of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ratoon.artifacts import build_once, require_exec, run
from ratoon.errors import HostError

INPUTS = {"format": 1, "packages": ["a_1.deb", "b_2.deb"]}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RATOON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def writing(text: str) -> Callable[[Path], None]:
    def build(directory: Path) -> None:
        (directory / "made").write_text(text)

    return build


def never(directory: Path) -> None:
    raise AssertionError(f"{directory} is there already")


def kept(cache: Path) -> list[str]:
    """What is in the cache of `kind`, locks left out: nobody can tell when to remove those."""
    return sorted(path.name for path in (cache / "kind").iterdir() if path.suffix != ".lock")


def test_it_is_built_and_says_what_of(cache: Path) -> None:
    said: list[str] = []
    path = build_once("kind", INPUTS, writing("hello"), said.append)
    assert path.parent == cache / "kind"
    assert (path / "made").read_text() == "hello"
    assert json.loads((path / "inputs.json").read_bytes()) == INPUTS
    assert said == ["building kind"]
    assert kept(cache) == [path.name]


def test_the_second_time_it_is_there(cache: Path) -> None:
    path = build_once("kind", INPUTS, writing("hello"))
    said: list[str] = []
    reordered = dict(reversed(INPUTS.items()))
    assert build_once("kind", reordered, never, said.append) == path
    assert said == []


@pytest.mark.parametrize(
    "other", [{**INPUTS, "format": 2}, {**INPUTS, "packages": ["b_2.deb", "a_1.deb"]}, {}]
)
def test_other_inputs_are_another_artifact(cache: Path, other: dict[str, object]) -> None:
    one = build_once("kind", INPUTS, writing("one"))
    two = build_once("kind", other, writing("two"))
    assert one != two
    assert (one / "made").read_text() == "one"
    assert (two / "made").read_text() == "two"


def test_equal_inputs_of_another_kind_are_another_artifact(cache: Path) -> None:
    assert build_once("kind", INPUTS, writing("one")) != build_once("sort", INPUTS, writing("two"))


def test_a_failure_leaves_nothing_and_may_be_tried_again(cache: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise HostError("no space")

    for _ in range(2):
        with pytest.raises(HostError, match="no space"):
            build_once("kind", INPUTS, fail)
        assert kept(cache) == []
    path = build_once("kind", INPUTS, writing("after all"))
    assert [file.name for file in sorted(path.iterdir())] == ["inputs.json", "made"]


def test_the_litter_of_a_crash_is_replaced(cache: Path) -> None:
    path = build_once("kind", INPUTS, writing("hello"))
    litter = path.with_name(f".{path.name}.tmp")
    path.rename(litter)
    (litter / "half").touch()
    assert build_once("kind", INPUTS, writing("anew")) == path
    assert [file.name for file in sorted(path.iterdir())] == ["inputs.json", "made"]
    assert kept(cache) == [path.name]


def test_of_many_threads_one_builds(cache: Path) -> None:
    built = []
    asking = threading.Barrier(8)

    def build(directory: Path) -> None:
        built.append(directory)
        (directory / "made").touch()

    def ask(_: int) -> Path:
        asking.wait()
        return build_once("kind", INPUTS, build)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert len(built) == 1


def test_of_many_processes_one_builds(cache: Path, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from ratoon.artifacts import build_once
def build(directory):
    with open(sys.argv[1], "a") as log:
        log.write("built\\n")
    time.sleep(0.2)
    (directory / "made").touch()
assert (build_once("kind", {"a": 1}, build) / "made").exists()
"""
    log = tmp_path / "log"
    command = [sys.executable, "-c", script, str(log)]
    builders = [subprocess.Popen(command) for _ in range(4)]
    assert [builder.wait() for builder in builders] == [0] * 4
    assert log.read_text() == "built\n"


def test_a_builder_that_is_killed_leaves_the_way_free(cache: Path, tmp_path: Path) -> None:
    script = """
import sys, time
from ratoon.artifacts import build_once
def build(directory):
    (directory / "half").touch()
    print("building", flush=True)
    time.sleep(60)
build_once("kind", {"a": 1}, build)
"""
    builder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert builder.stdout
    assert builder.stdout.readline() == b"building\n"
    builder.kill()
    builder.communicate()
    path = build_once("kind", {"a": 1}, writing("hello"))
    assert not (path / "half").exists()
    assert kept(cache) == [path.name]


# Programs of the host -------------------------------------------------------------------------


def test_what_a_program_writes(tmp_path: Path) -> None:
    assert run(["pwd"], cwd=tmp_path).decode().strip() == str(tmp_path)
    assert run(["cat"], stdin=b"\0\xff") == b"\0\xff"
    assert run([Path("/bin/sh"), "-c", "echo out; echo err >&2"]) == b"out\n"


def test_a_program_that_fails_says_why() -> None:
    with pytest.raises(HostError, match=r"^sh failed with exit code 3:\nthe reason$"):
        run(["/bin/sh", "-c", "echo output; echo the reason >&2; exit 3"])


def test_of_a_long_complaint_the_end_is_told() -> None:
    with pytest.raises(HostError) as failure:
        run(
            ["sh", "-c", "head -c 100000 /dev/zero | tr '\\0' x >&2; printf '\\377end' >&2; exit 1"]
        )
    assert str(failure.value).endswith("\ufffdend")
    assert len(str(failure.value)) < 2100


def test_a_program_that_is_missing() -> None:
    with pytest.raises(HostError, match="no-such-program is not installed; `ratoon setup` says"):
        run(["/nowhere/no-such-program", "--version"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_cache_where_no_program_can_be_run(tmp_path: Path) -> None:
    """What is built elsewhere is well; here it says what to do, before anything is fetched."""
    require_exec(tmp_path)
    script = """
import sys
from pathlib import Path
from ratoon import syscalls
from ratoon.syscalls import CLONE_NEWNS, MS_PRIVATE, MS_REC
syscalls.unshare(CLONE_NEWNS)
syscalls.mount("none", "/", None, MS_REC | MS_PRIVATE)
MS_NOEXEC = 8
syscalls.mount("tmpfs", sys.argv[1], "tmpfs", MS_NOEXEC)
from ratoon.jail.tree import tree
from ratoon.machine.guest.build import build_guest
for make in (build_guest, lambda: tree([Path("/bin/sh")], {})):
    try:
        make()
    except Exception as error:
        print(type(error).__name__, error)
"""
    (tmp_path / "cache").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "cache"],
        env={**os.environ, "RATOON_CACHE": str(tmp_path / "cache")},
        check=True,
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()
    assert len(said) == 2
    for line in said:
        assert line.startswith(f"HostError no program can be run in {tmp_path / 'cache'}/")
        assert "`noexec`: set RATOON_CACHE" in line
