"""Durable writes, locks and links, and the places in the environment."""

from __future__ import annotations

import errno
import os
import pwd
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from ratoon import files, paths
from ratoon.errors import HostError, InvalidInput


def test_concurrent_durable_writes_leave_one_whole_content(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    contents = [bytes([i]) * 10_000 for i in range(8)]
    threads = [threading.Thread(target=files.write_durable, args=(target, c)) for c in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


def test_a_failed_durable_write_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "state.json"
    files.write_durable(target, b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        files.write_durable(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_lock_is_held_until_its_descriptor_closes(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "directory" else tmp_path / "lock"
    held = files.try_lock(path)
    assert held is not None
    assert files.try_lock(path) is None
    os.close(held)
    again = files.try_lock(path)
    assert again is not None
    os.close(again)


def test_a_lock_is_looked_at_and_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not files.is_locked(path)
    assert not path.exists()
    with files.locked(path):
        assert files.is_locked(path)
    assert not files.is_locked(path)
    held = files.try_lock(path)
    assert held is not None
    os.close(held)


def test_locking_a_directory_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.try_lock_directory(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A sparse file of 1 MiB with four bytes in the middle, last modified long ago."""
    source = tmp_path / "a"
    with source.open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"data")
    os.utime(source, ns=(1, 2))
    return source


def failing(code: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(code, os.strerror(code))

    return fail


def refuse(*_: object) -> bool:
    return False


@pytest.mark.parametrize("code", [errno.EMLINK, errno.EXDEV, errno.EPERM])
@pytest.mark.parametrize("crossing", [False, True])
def test_where_no_link_can_be_made_a_sparse_durable_copy_is(
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    crossing: bool,
) -> None:
    """Also from one kind of file system to another, where the kernel does not copy ranges."""
    target = source.with_name("b")
    flushed: list[Path] = []
    monkeypatch.setattr(os, "link", failing(code))
    monkeypatch.setattr(files, "clone_range", refuse)
    monkeypatch.setattr(files, "fsync_path", flushed.append)
    if crossing:
        monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
    files.link_or_copy(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mtime_ns == 2
    assert target.stat().st_ino != source.stat().st_ino
    assert target.stat().st_blocks * 512 < 1 << 20
    assert flushed == [target]
    (told,) = caplog.messages
    assert told == f"cannot link {source} to {target} ({os.strerror(code)}): it was copied"


def test_before_a_copy_a_reflink_is_tried(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = source.with_name("b")

    def clone(source: int, source_offset: int, length: int, target: int, at: int) -> bool:
        assert (source_offset, length, at) == (0, 0, 0), "the whole file"
        os.write(target, os.pread(source, 1 << 20, 0))
        return True

    monkeypatch.setattr(os, "link", failing(errno.EMLINK))
    monkeypatch.setattr(files, "clone_range", clone)
    monkeypatch.setattr(files, "copy_sparse", failing(errno.ENOSYS))
    files.link_or_copy(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_mtime_ns == 2
    assert caplog.messages[0].endswith("(Too many links): a reflink shares its extents")


def test_links_are_not_followed_where_a_tree_is_flushed(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to("/none/of/this")
    files.fsync_tree(tmp_path)


@pytest.mark.parametrize("call", ["copy_file_range", "ftruncate", "lseek", "fsync", "utime"])
def test_a_copy_that_fails_leaves_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", failing(errno.EMLINK))
        patch.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left"):
            files.link_or_copy(source, source.with_name("b"))
    assert [*source.parent.iterdir()] == [source]


def test_a_copy_replaces_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = source.with_name("b")
    target.write_bytes(b"mine")
    monkeypatch.setattr(os, "link", failing(errno.EXDEV))
    with pytest.raises(FileExistsError):
        files.link_or_copy(source, target)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left", "/a"), "/a: No space left; free some space there"),
        (OSError(errno.EIO, "I/O error", "/a"), "/a: I/O error; the disk below may be failing"),
        (OSError(errno.ENOLCK, "No locks", "/a"), "/a: No locks; this file system has no locks"),
        (OSError(errno.EXDEV, "Crosses", "/a", None, "/b"), "/a and /b: Crosses"),
        (OSError(errno.EBUSY, "Busy"), "Busy"),
        (OSError("just words"), "just words"),
    ],
)
def test_an_error_is_told_with_its_file_and_the_way_out(error: OSError, told: str) -> None:
    assert files.describe(error).startswith(told)


def test_a_store_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.require_own(tmp_path)
    name = pwd.getpwuid(os.geteuid()).pw_name
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(HostError, match=rf"another user, {name}: run this as {name}, or set"):
        files.require_own(tmp_path)


def test_an_unexpected_link_error_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.link_or_copy(tmp_path / "missing", tmp_path / "b")


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("HOME", "CACHE", "RUNTIME"):
        monkeypatch.delenv(f"RATOON_{name}", raising=False)
        monkeypatch.delenv(f"XDG_{name}_DIR", raising=False)
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/ann")
    return monkeypatch


def test_root_uses_the_system_directories(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setattr(os, "geteuid", lambda: 0)
    assert paths.home() == Path("/var/lib/ratoon")
    assert paths.cache() == Path("/var/cache/ratoon")
    assert paths.runtime(paths.home()).parent == Path("/run/ratoon")


def test_a_user_has_directories_of_their_own(bare_environment: pytest.MonkeyPatch) -> None:
    bare_environment.setattr(os, "geteuid", lambda: 1000)
    assert paths.home() == Path("/home/ann/.local/share/ratoon")
    assert paths.cache() == Path("/home/ann/.cache/ratoon")
    assert paths.runtime(paths.home()).parent == Path("/tmp/ratoon-1000")
    bare_environment.setenv("XDG_DATA_HOME", "/data")
    bare_environment.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert paths.home() == Path("/data/ratoon")
    assert paths.runtime(paths.home()).parent == Path("/run/user/1000/ratoon")


def test_ratoon_variables_win(bare_environment: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "CACHE", "RUNTIME"):
        bare_environment.setenv(f"RATOON_{name}", f"/x/{name}")
    assert [paths.home(), paths.cache(), paths.runtime(Path("/any"))] == [
        Path("/x/HOME"),
        Path("/x/CACHE"),
        Path("/x/RUNTIME"),
    ]


def test_one_store_has_one_runtime_directory(
    bare_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "alias").symlink_to("home")
    assert paths.runtime(tmp_path / "home") == paths.runtime(tmp_path / "alias")
    assert paths.runtime(tmp_path / "home") != paths.runtime(tmp_path / "other")


def test_a_runtime_directory_too_long_for_sockets_is_refused(
    bare_environment: pytest.MonkeyPatch,
) -> None:
    longest = 107 - len("/sb-xxxxxxxx-xxxx/999999/volumes")
    bare_environment.setenv("RATOON_RUNTIME", "/" + "r" * (longest - 1))
    paths.runtime(Path("/any"))
    bare_environment.setenv("RATOON_RUNTIME", "/" + "r" * longest)
    with pytest.raises(InvalidInput, match=r"1 bytes too long.*RATOON_RUNTIME"):
        paths.runtime(Path("/any"))
