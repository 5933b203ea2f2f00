"""A sandbox's directory, whose owner may die at any step: what it stands on is there, and whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ratoon.engine.sandbox.directory import SandboxDirectory
from ratoon.errors import Corrupt
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import check_sizes
from small_snapshots import publish, write_snapshot


class Death(BaseException):
    """The owner is killed."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "home")


@pytest.fixture
def base(store: Store) -> Snapshot:
    return publish(store, "base", {0: 1, 1: 2})


@pytest.fixture
def above(store: Store, base: Snapshot) -> Snapshot:
    return publish(store, "above", {1: 3}, base)


@pytest.fixture
def directory(store: Store, base: Snapshot, tmp_path: Path) -> Iterator[SandboxDirectory]:
    """It stands on `base`."""
    directory = SandboxDirectory.create(store.sandboxes, store.lock, tmp_path / "run")
    directory.stand_on(base)
    yield directory
    directory.remove()


def taken_over(directory: SandboxDirectory, *, runs: bool = False) -> Snapshot:
    """What it stands on for whoever takes it over; all of that is there, and no more."""
    other = SandboxDirectory(directory.path, os.dup(directory._lock), directory.path / "run")
    found = other.parent(runs=runs)
    other.let_go()
    check_sizes(found)
    origin = directory.origin(found)
    assert origin is not None
    check_sizes(origin)
    assert not origin.manifest.layers[-1].anonymous
    names = {"parent", "origin"} if directory.is_own(found.manifest) else {"parent"}
    assert {path.name for path in directory.path.iterdir()} == names
    return found


def stand_by(
    store: Store, directory: SandboxDirectory, before: Snapshot, pages: dict[int, int]
) -> Snapshot:
    """Have it stand on itself, as it does in standby."""
    with directory.stage() as staging:
        written = write_snapshot(store, staging, pages, before, anonymous=True)
        return directory.stand_on_itself(staging.publish(written), before)


def deaths(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> Iterator[bool]:
    """Do the work again and again, killed at each of its steps; in the end it is done (True)."""
    for step in range(100):
        left = step
        with monkeypatch.context() as patch:

            def counted(original: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal left
                    if not left:
                        raise Death
                    left -= 1
                    return original(*arguments, **options)

                return call

            for owner, name in ((Path, "rename"), (os, "unlink"), (os, "rmdir"), (os, "link")):
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                work()
            except Death:
                pass
            else:
                break
        yield False
    yield True


def test_another_snapshot(
    directory: SandboxDirectory,
    base: Snapshot,
    above: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It stands on the one or the other; once it could not be undone any more, on the new one."""
    found = []
    for done in deaths(monkeypatch, lambda: directory.stand_on(above)):
        found.append(taken_over(directory).manifest)
        if not done:
            directory.stand_on(base)
    assert len(found) > 10
    assert found[0] == base.manifest
    assert found[-1] == above.manifest
    assert found == sorted(found, key=lambda manifest: manifest == above.manifest)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("runs", [False, True])
def test_itself(
    store: Store,
    directory: SandboxDirectory,
    base: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
    runs: bool,
) -> None:
    """Whoever takes it over finds itself, as soon as that was published.

    Of one that runs: what it stood on before, as long as that is there.
    """
    before = base

    def publish() -> Snapshot:
        with directory.stage() as staging:
            written = write_snapshot(store, staging, {1: 4}, before, anonymous=True)
            snapshot = staging.publish(written)
            try:
                return directory.stand_on_itself(snapshot, before)
            except Death:  # nobody gets to leave the block
                shutil.copytree(directory.path, saved, dirs_exist_ok=True)
                raise

    saved = directory.path.with_name("saved")
    found = []
    if times == 2:
        before = stand_by(store, directory, base, {1: 3})
    for done in deaths(monkeypatch, publish):
        if saved.exists():
            shutil.rmtree(directory.path)
            saved.rename(directory.path)
            assert directory.has_standby() or not done
            parent = taken_over(directory, runs=runs)
            found.append(len(parent.manifest.layers) - 1)
            if not runs:
                assert found[-1] == times
            origin = directory.origin(parent)
            assert origin is not None
            assert origin.manifest == base.manifest
        directory.discard_standby()
        before = directory.stand_on(base)
        if times == 2:
            before = stand_by(store, directory, base, {1: 3})
    assert len(found) >= 2
    assert set(found) == ({times - 1, times} if runs else {times})
    assert found == sorted(found)


def test_back_to_its_origin(
    store: Store, directory: SandboxDirectory, base: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    origin: Snapshot | None = None

    def stand_on_itself() -> None:
        nonlocal origin
        parent = stand_by(store, directory, directory.stand_on(base), {1: 3})
        parent = stand_by(store, directory, parent, {1: 4})
        origin = directory.origin(parent)

    def go_back() -> None:
        assert origin is not None
        directory.go_back(origin)

    stand_on_itself()
    for _ in deaths(monkeypatch, go_back):
        found.append(taken_over(directory).manifest)
        stand_on_itself()
    assert len(found) > 5
    assert found[0].layers[-1].anonymous
    assert found[-1] == base.manifest
    assert found == sorted(found, key=lambda manifest: manifest == base.manifest)


def test_the_origin_of_an_older_ratoon_is_not_believed(
    store: Store, directory: SandboxDirectory, base: Snapshot, above: Snapshot
) -> None:
    """It stands on itself above `above`, and what lies there is from before that was branched."""
    parent = stand_by(store, directory, directory.stand_on(above), {1: 4})
    shutil.rmtree(directory.path / "origin")
    assert directory.origin(parent) is None
    directory.keep_origin(base)
    assert directory.origin(parent) is None
    directory.keep_origin(above)
    assert taken_over(directory).manifest == parent.manifest


def test_what_was_not_stood_on_is_gone(
    store: Store, directory: SandboxDirectory, base: Snapshot
) -> None:
    def fail(published: bool) -> None:
        with directory.stage() as staging:
            written = write_snapshot(store, staging, {1: 4}, base, anonymous=True)
            if published:
                staging.publish(written)
            raise OSError("full")

    before = sorted(path.name for path in directory.path.iterdir())
    for published in (False, True):
        with pytest.raises(OSError, match="full"):
            fail(published)
        assert sorted(path.name for path in directory.path.iterdir()) == before
        assert not directory.has_standby()


@pytest.mark.parametrize("step", [0, 1])
def test_a_rename_that_fails_changes_nothing(
    directory: SandboxDirectory,
    base: Snapshot,
    above: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    rename = Path.rename
    calls = []

    def fail(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == step + 1:
            raise OSError("it cannot be")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(OSError, match="it cannot be"):
            directory.stand_on(above)
    assert taken_over(directory).manifest == base.manifest


def test_it_stands_on_what_was_deleted(
    store: Store, directory: SandboxDirectory, base: Snapshot, above: Snapshot
) -> None:
    directory.stand_on(above)
    store.delete("base", cascade=True)
    assert taken_over(directory).manifest == above.manifest


def test_one_that_stands_on_nothing(directory: SandboxDirectory) -> None:
    shutil.rmtree(directory.path / "parent")
    with pytest.raises(Corrupt, match="parent"):
        directory.parent()


def test_names_go_on_where_they_were(
    store: Store, directory: SandboxDirectory, tmp_path: Path
) -> None:
    """An overlay's name is never used again: layers of snapshots are links to it."""
    overlays = [directory.next_overlay() for _ in range(3)]
    for overlay in overlays:
        overlay.touch()
    sockets = directory.next_runtime()
    sockets.mkdir(parents=True)
    other = SandboxDirectory(directory.path, os.dup(directory._lock), tmp_path / "run")
    assert other.next_overlay() not in overlays
    assert other.next_runtime() != sockets
    other.forget_overlays(overlays[1])
    assert [overlay.exists() for overlay in overlays] == [False, True, False]
    other.let_go()
