"""A sandbox's directory: its overlays, its logs, and hard links to all that it stands on.

::

    sandboxes/ID/
      state.json           what whoever takes it over must know; see `record`
      parent/              a twin of the snapshot it stands on; in standby, the sandbox itself
      origin/              a twin of what a reset goes back to, where that is not `parent`
      disk.qcow2 …         its overlays, numbered
      log, log.console     QEMU's, and the guest's console
      cgroups              which control groups were made for it
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ratoon import files
from ratoon.concurrency import in_thread
from ratoon.errors import RatoonError
from ratoon.machine.host import cgroups
from ratoon.store.snapshot.manifest import Manifest
from ratoon.store.snapshot.snapshot import Snapshot, link_snapshot, load_snapshot
from ratoon.store.snapshot.staging import Staging

LOG = "log"
PARENT = "parent"
ORIGIN = "origin"

_OVERLAY = re.compile(r"disk(?:-(\d+))?\.qcow2")


class SandboxDirectory:
    """`sandboxes/ID`: made for one sandbox, held by its flock, removed with it.

    It has hard links to every layer that the sandbox stands on, and to all that a reset needs, so
    the snapshots that those come from may be deleted at any time.
    """

    def __init__(self, path: Path, lock: int, runtime: Path) -> None:
        """Of a directory that is there; `lock` is the descriptor that holds it."""
        self.path = path
        self._runtime = runtime / path.name
        self._lock = lock
        self._overlays = max((_number(each) + 1 for each in self.overlays()), default=0)
        taken = self._runtime.iterdir() if self._runtime.exists() else ()
        self._machines = max((int(name.name) for name in taken), default=0)

    @classmethod
    def create(cls, sandboxes: Path, store_lock: Path, runtime: Path) -> SandboxDirectory:
        """Draw an id, reserve it by `mkdir`, and hold the directory."""
        with files.locked(store_lock, shared=True):
            while True:
                path = sandboxes / f"sb-{int(time.time()):x}-{secrets.token_hex(2)}"
                with suppress(FileExistsError):
                    path.mkdir(mode=0o700)
                    break
            lock = files.try_lock_directory(path)
            assert lock is not None, "a sweep would need the store's lock"
        return cls(path, lock, runtime)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def log(self) -> Path:
        return self.path / LOG

    def next_runtime(self) -> Path:
        """Where the sockets of the sandbox's next machine go; the one before may still run."""
        self._machines += 1
        return self._runtime / str(self._machines)

    def next_overlay(self) -> Path:
        """A name for the next overlay. The first is disk.qcow2; a frozen one keeps its name."""
        number = f"-{self._overlays}" if self._overlays else ""
        self._overlays += 1
        return self.path / f"disk{number}.qcow2"

    def overlays(self) -> tuple[Path, ...]:
        """Those that are there, in no order."""
        return tuple(path for path in self.path.iterdir() if _OVERLAY.fullmatch(path.name))

    def forget_overlays(self, *keep: Path | None) -> None:
        """Unlink all overlays but these: no machine writes to them, and layers have links."""
        for path in self.overlays():
            if path not in keep:
                path.unlink()

    def stand_on(self, snapshot: Snapshot) -> Snapshot:
        """Hard-link all of `snapshot`, in place of what the sandbox stood on before.

        A reset goes back to that from now on.
        """
        shutil.rmtree(self._new, ignore_errors=True)
        try:
            link_snapshot(snapshot, self._new)
            self._replace_parent(self._new, self._old)
        except BaseException:
            shutil.rmtree(self._new, ignore_errors=True)
            raise
        self._forget(self._old, self._origin)
        return self.twin_of(snapshot)

    def twin_of(self, snapshot: Snapshot) -> Snapshot:
        """What `stand_on` makes of `snapshot`, whether it has or not."""
        return Snapshot(self.path / PARENT, snapshot.manifest)

    @contextmanager
    def stage(self) -> Iterator[Staging]:
        """Where the sandbox's own state is written; gone on leaving, unless it stands on it."""
        self.discard_standby()
        self._unfinished.mkdir(mode=0o700)
        try:
            yield Staging(self._unfinished, self.id, self._standby)
        finally:
            self.discard_standby()

    def stand_on_itself(self, snapshot: Snapshot, before: Snapshot) -> Snapshot:
        """Take what was published from `stage` in place of `before`, on which it stood.

        What a reset goes back to stays: if that was `before`, it is `origin` now.
        """
        self._replace_parent(
            self._standby, self._old if self.is_own(before.manifest) else self._origin
        )
        self._forget(self._old)
        return self.twin_of(snapshot)

    def go_back(self, origin: Snapshot) -> Snapshot:
        """Stand on `origin`, which lies there, and no more on itself."""
        self._replace_parent(self._origin, self._old)
        self._forget(self._old)
        return self.twin_of(origin)

    def keep_origin(self, snapshot: Snapshot) -> Snapshot:
        """Hard-link all of `snapshot` as what a reset goes back to."""
        self._forget(self._new, self._origin)
        link_snapshot(snapshot, self._new)
        self._new.rename(self._origin)
        return Snapshot(self._origin, snapshot.manifest)

    def is_own(self, manifest: Manifest) -> bool:
        """Whether it is the sandbox itself, as it was at a standby, or when it was forked."""
        return manifest.layers[-1].anonymous and manifest.tag == self.id

    def has_standby(self) -> bool:
        """Whether its own state was written whole, for a standby that was not completed."""
        return self._standby.exists()

    def parent(self, *, runs: bool = False) -> Snapshot:
        """What it stands on, as it lies there. Corrupt.

        That is itself where somebody died between its standby and `stand_on_itself`; of one that
        `runs` on, only where what it stood on before is out of the way already.
        """
        parent = self.path / PARENT
        if not parent.exists():  # somebody died while it was replaced
            for new in filter(Path.exists, (self._standby, self._new, self._origin)):
                new.rename(parent)
                break
        elif self.has_standby() and not runs:
            self._replace_parent(self._standby, self._old if self._is_on_itself() else self._origin)
        self.discard_standby()
        self._forget(self._new, self._old)
        found = load_snapshot(parent)
        if not self.is_own(found.manifest):
            self._forget(self._origin)
        return found

    def origin(self, parent: Snapshot) -> Snapshot | None:
        """What a reset of the sandbox, which stands on `parent`, goes back to, as it lies there.

        None: there is none, or none that can be read. An older Ratoon kept none, and left alone
        what it found.
        """
        if not self.is_own(parent.manifest):
            return parent
        try:
            found = load_snapshot(self._origin)
        except RatoonError:
            return None
        same = found.manifest.reference.id == parent.manifest.reference.id
        return found if same else None

    def discard_standby(self) -> None:
        """Forget what was written for a standby that was not completed."""
        self._forget(self._standby, self._unfinished)

    async def remove_cgroups(self) -> None:
        """Remove the control groups of a machine that is gone, beside the event loop."""
        if (self.path / cgroups.RECORD).exists():
            await asyncio.to_thread(cgroups.remove, self.path)

    def let_go(self) -> None:
        """Hold it no more; it stays."""
        os.close(self._lock)

    def remove(self) -> None:
        """Delete the directory, the machine's sockets and control groups, and let it go."""
        cgroups.remove(self.path)
        shutil.rmtree(self._runtime, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    async def delete(self) -> None:
        """As `remove`, beside the event loop: control groups are slow, and so are many links."""
        await in_thread(self.remove)

    @property
    def _new(self) -> Path:
        return self.path / f"{PARENT}.new"

    @property
    def _old(self) -> Path:
        return self.path / f"{PARENT}.old"

    @property
    def _origin(self) -> Path:
        return self.path / ORIGIN

    @property
    def _standby(self) -> Path:
        return self.path / "standby"

    @property
    def _unfinished(self) -> Path:
        return self.path / "standby.new"

    def _is_on_itself(self) -> bool:
        """Whether it stands on itself, or on what cannot be read and is no good for a reset."""
        try:
            return self.is_own(load_snapshot(self.path / PARENT).manifest)
        except RatoonError:
            return True

    def _replace_parent(self, new: Path, aside: Path) -> None:
        """Put `new` in the place of what it stands on, which goes `aside`.

        At every instant the old one or the new one is there, whole; see `parent`.
        """
        parent = self.path / PARENT
        self._forget(aside)
        with suppress(FileNotFoundError):  # there was none yet
            parent.rename(aside)
        try:
            new.rename(parent)
        except OSError:
            with suppress(FileNotFoundError):
                aside.rename(parent)
            raise

    def _forget(self, *names: Path) -> None:
        for name in names:
            shutil.rmtree(name, ignore_errors=True)


def _number(overlay: Path) -> int:
    match = _OVERLAY.fullmatch(overlay.name)
    assert match
    return int(match[1] or 0)
