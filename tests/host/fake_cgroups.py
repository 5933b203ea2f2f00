"""A tree of files that looks like a hierarchy of version 2, and a kernel that keeps it so."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ratoon.machine.host.hierarchies import Hierarchy

FILES = {
    "memory": ("memory.max", "memory.swap.max", "memory.events"),
    "cpu": ("cpu.max", "cpu.stat"),
    "pids": ("pids.max", "pids.events"),
}


class FakeKernel:
    """Fills new directories below `top`, hands controllers down, and moves processes."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top = top
        top.mkdir()
        self._real_write = Path.write_text
        real_mkdir = Path.mkdir

        def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
            new = not path.exists()
            real_mkdir(path, *arguments, **options)
            if new and top in path.parents:
                self._fill(path)

        def rmdir(path: Path) -> None:
            if any(child.is_dir() for child in path.iterdir()):
                raise OSError(errno.EBUSY, "Device or resource busy", str(path))
            shutil.rmtree(path)

        def write(path: Path, text: str, *arguments: Any) -> int:
            if path.name == "cgroup.subtree_control":
                text = " ".join(sorted({*path.read_text().split(), *text.replace("+", "").split()}))
            elif path.name == "cgroup.procs":
                for other in top.rglob("cgroup.procs"):
                    left = [pid for pid in other.read_text().split() if pid != text]
                    self._real_write(other, "\n".join(left))
                text = f"{path.read_text()}\n{text}"
            return self._real_write(path, text, *arguments)

        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)
        monkeypatch.setattr(Path, "write_text", write)
        self._set(top, "cgroup.controllers", "cpuset cpu io memory pids")
        self._set(top, "cgroup.subtree_control", "")
        self._set(top, "cgroup.procs", "1")

    def group(self, name: str, *, passed: str = "", inside: Iterable[int] = ()) -> Path:
        """A group below the top, which passes these controllers on and has these processes."""
        path = self.top / name
        path.mkdir(parents=True)
        self._set(path, "cgroup.subtree_control", passed)
        self._set(path, "cgroup.procs", "\n".join(map(str, inside)))
        return path

    def hierarchy(self, own: Path) -> Hierarchy:
        return Hierarchy(2, frozenset(), self.top, own)

    def _fill(self, path: Path) -> None:
        passed = (path.parent / "cgroup.subtree_control").read_text()
        self._set(path, "cgroup.controllers", passed)
        self._set(path, "cgroup.type", "domain")
        for name in ("cgroup.subtree_control", "cgroup.procs"):
            self._set(path, name, "")
        for controller in passed.split():
            for name in FILES[controller]:
                self._set(path, name, "")

    def _set(self, group: Path, name: str, text: str) -> None:
        self._real_write(group / name, text)


def words(path: Path) -> set[str]:
    return set(path.read_text().split())
