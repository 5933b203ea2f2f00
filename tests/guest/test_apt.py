"""What apt was asked is asked again when what its answer came from has changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ratoon.artifacts import run
from ratoon.errors import HostError
from ratoon.machine.guest import apt


class Counting:
    """Stands in for `run`: each answer is another one."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, command: Sequence[str | Path], *, cwd: Path) -> bytes:
        self.count += 1
        return f"{' '.join(map(str, command))}: {self.count}".encode()


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host's files of apt, which it has no others of; answers are counted."""
    host = tmp_path / "host"
    for name in ("etc/apt/sources.list.d", "lists/partial"):
        (host / name).mkdir(parents=True)
    for name in ("etc/apt/sources.list.d/debian.sources", "lists/Packages", "status"):
        (host / name).write_text(name)
    sources = tuple(host / name for name in ("etc/apt", "lists", "status", "arch"))
    monkeypatch.setattr(apt, "SOURCES", sources)
    monkeypatch.setattr(apt, "run", Counting())
    monkeypatch.setenv("RATOON_CACHE", str(tmp_path / "cache"))
    return host


def test_an_answer_is_remembered_for_its_question(host: Path, tmp_path: Path) -> None:
    assert [apt.ask(["a", "b"]), apt.ask(["a", "c"])] == ["a b: 1", "a c: 2"]
    assert [apt.ask(["a", "b"]), apt.ask(["a", "c"])] == ["a b: 1", "a c: 2"]
    # Of two questions that are kept under one name neither gets the other's answer.
    assert [apt.ask(["a b"]), apt.ask(["a", "b"])] == ["a b: 3", "a b: 4"]
    for kept in (tmp_path / "cache/apt").iterdir():
        kept.write_text("{")
    assert apt.ask(["a", "b"]) == "a b: 5"


def _updated(host: Path) -> None:
    """As apt replaces a list: by another file of the same size, even at the same time."""
    lists = host / "lists"
    before = (lists / "Packages").stat()
    (lists / "partial/Packages").write_text("LISTS/Packages")
    os.utime(lists / "partial/Packages", ns=(before.st_atime_ns, before.st_mtime_ns))
    (lists / "partial/Packages").rename(lists / "Packages")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a list was updated": _updated,
    "a list is gone": lambda host: (host / "lists/Packages").unlink(),
    "all lists are gone": lambda host: shutil.rmtree(host / "lists"),
    "there is another list": lambda host: (host / "lists/Sources").touch(),
    "there is another source": lambda host: (host / "etc/apt/sources.list").touch(),
    "a package was installed": lambda host: (host / "status").write_text("more"),
    "an architecture was added": lambda host: (host / "arch").write_text("i386"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_is_asked_again_when_something_has_changed(
    host: Path, change: Callable[[Path], object]
) -> None:
    assert apt.ask(["a"]) == "a: 1"
    change(host)
    assert [apt.ask(["a"]), apt.ask(["a"])] == ["a: 2", "a: 2"]


def test_an_update_that_brings_nothing_changes_no_answer(host: Path) -> None:
    assert apt.ask(["a"]) == "a: 1"
    (host / "lists/partial/Packages").touch()
    (host / "lists/partial/Packages").unlink()
    assert apt.ask(["a"]) == "a: 1"


def test_a_failure_is_not_remembered(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(apt, "run", run)
        with pytest.raises(HostError, match="false failed"):
            apt.ask(["false"])
    assert apt.ask(["false"]) == "false: 1"


def test_this_host_has_what_apt_answers_from() -> None:
    assert apt._state() == apt._state()
    assert [source for source in apt.SOURCES[:3] if not source.exists()] == []
