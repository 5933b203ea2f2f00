"""Named volumes: directories of the store, `volumes/NAME`, which live until they are removed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from ratoon.api.answers import VolumeInfo
from ratoon.errors import AlreadyExists, NotFound
from ratoon.files import fsync_path

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def check_name(name: str) -> None:
    """ValueError: no volume can have that name."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is neither an absolute path nor the name of a volume: a name has up to 64 "
            "lower-case letters, digits, '-', '_' and '.', and begins with a letter or digit"
        )


def directory(home: Path) -> Path:
    """Where the named volumes of the store `home` are."""
    return home / "volumes"


def find(home: Path, name: str) -> Path:
    """A named volume's directory; made where there is none yet."""
    path = directory(home).resolve() / name
    if not path.is_dir():
        _make(path)
    return path


def create(home: Path, name: str) -> VolumeInfo:
    """Make a new, empty one. AlreadyExists."""
    path = directory(home).resolve() / name
    try:
        _make(path)
    except FileExistsError:
        raise AlreadyExists(f"there is a volume {name} already") from None
    return _look(path)


def listed(home: Path) -> list[VolumeInfo]:
    """All of them, by name; reads all their directories."""
    try:
        found = sorted(directory(home).resolve().iterdir())
    except FileNotFoundError:
        return []
    return [_look(path) for path in found if _NAME.fullmatch(path.name) and path.is_dir()]


def remove(home: Path, name: str, hold: Callable[[Path], AbstractContextManager[None]]) -> None:
    """Delete one with all its files. NotFound; what `hold` raises: it is in use."""
    path = directory(home).resolve() / name
    if not path.is_dir():
        raise NotFound(f"no volume {name}")
    with hold(path):
        gone = path.with_name(f".{name}.removed")
        shutil.rmtree(gone, ignore_errors=True)  # of one who was interrupted
        path.rename(gone)
        shutil.rmtree(gone)


def _make(path: Path) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o755)
    fsync_path(path.parent)


def _look(path: Path) -> VolumeInfo:
    found = path.stat()
    size = 0
    for directory, _, names in os.walk(path):
        for name in names:
            with suppress(OSError):  # it is in use, or deeper than a path is long
                size += os.lstat(f"{directory}/{name}").st_blocks * 512
    return VolumeInfo(path.name, str(path), size, found.st_ctime)
