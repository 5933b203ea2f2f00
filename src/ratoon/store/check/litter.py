"""What lies in the store that no snapshot consists of: litter, strangers, and work under way.

Staging and sandbox directories are held by their flock, half-made images by that of their lock
file, other temporary files by the thread whose number is in the name. What is held is in use.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ratoon import files
from ratoon.errors import RatoonError
from ratoon.store.check.findings import Finding, Kind, unreadable
from ratoon.store.check.inventory import Surveyed, identity_of
from ratoon.store.disk.qcow2 import check_header
from ratoon.store.snapshot.snapshot import (
    ANCESTRY,
    DISK,
    MANIFEST,
    MANIFEST_DIGEST,
    MEMORY,
    VERIFIED,
    VMSTATE,
)
from ratoon.store.snapshot.store import Store

#: In the directory of a sandbox that the next daemon is to take over.
SANDBOX_RECORD = "state.json"

#: Written by `files.write_durable` and for templates: the writer's thread id stands in the name.
_TEMPORARY = re.compile(r"\..+\.(?P<thread>\d+)\.tmp")
_IMAGE_TEMPORARY = re.compile(r"\.(?P<root>[0-9a-f]{64})\.(ram|qcow2(\.upper)?|json\.\d+)\.tmp")
_IMAGE_LOCK = re.compile(r"\.([0-9a-f]{2}|evict)\.lock")
_IMAGE_FILE = re.compile(r"[0-9a-f]{64}\.(ram|qcow2|json)")
_TEMPLATE = re.compile(r"overlay-(?P<size>\d+)\.qcow2")

_OWN = frozenset({MANIFEST, MANIFEST_DIGEST, VERIFIED, MEMORY, VMSTATE, DISK})
_LAYER = frozenset({MEMORY, DISK})


@dataclass
class Litter:
    """What was found besides snapshots, and what was passed over because somebody holds it."""

    findings: list[Finding] = field(default_factory=list)
    in_use: list[Path] = field(default_factory=list)

    def add(self, other: Litter) -> None:
        """Take over what was found elsewhere."""
        self.findings += other.findings
        self.in_use += other.in_use

    def judge(self, path: Path, held: bool, what: str) -> None:
        """Litter, unless it is held."""
        if held:
            self.in_use.append(path)
        else:
            self.findings.append(Finding.of(Kind.LITTER, path, what))

    def stranger(self, path: Path, *, snapshot: str | None = None) -> None:
        """A temporary file is litter; anything else Ratoon does not know."""
        if is_temporary(path):
            held = is_temporary_held(path)
            if held or os.path.lexists(path):
                self.judge(path, held, "a temporary file whose writer is gone")
        elif os.path.lexists(path):
            what = "not a name that Ratoon gives"
            self.findings.append(Finding.of(Kind.ORPHAN, path, what, snapshot=snapshot))


def find_litter(store: Store) -> Litter:
    """What nobody holds in staging/ and sandboxes/, and strange files there and in the rest.

    Takes the store's lock, as whoever claims such a directory does.
    """
    litter = Litter()
    with files.locked(store.lock) if store.lock.exists() else nullcontext():
        for parent, what in (
            (store.staging, "unfinished work that nobody holds"),
            (store.sandboxes, "a sandbox that nobody holds"),
        ):
            for path in _entries(parent):
                if _is_directory(path):
                    with suppress(FileNotFoundError):
                        held = is_directory_held(path) or _awaits_owner(path)
                        litter.judge(path, held, what)
                else:
                    litter.stranger(path)
    for path in _entries(store.home):
        if is_temporary(path):
            litter.stranger(path)
    for path in _entries(store.images):
        if match := _IMAGE_TEMPORARY.fullmatch(path.name):
            with image_lock(store, match["root"]) as free:
                if path.exists():
                    litter.judge(path, not free, "a half-made image that nobody works on")
        elif not _IMAGE_LOCK.fullmatch(path.name) and not _IMAGE_FILE.fullmatch(path.name):
            litter.stranger(path)
    for path in _entries(store.templates):
        if match := _TEMPLATE.fullmatch(path.name):
            litter.findings.extend(_check_template(path, int(match["size"])))
        else:
            litter.stranger(path)
    directories = (store.snapshots, store.staging, store.images, store.sandboxes, store.templates)
    litter.findings.extend(check_modes(*directories))
    return litter


def find_strangers(surveyed: Surveyed) -> Litter:
    """Files in a snapshot's directory that its manifest does not speak of."""
    snapshot = surveyed.snapshot
    ancestry = snapshot.path / ANCESTRY
    layers = {ancestry / str(number) for number in range(snapshot.depth)}
    known = {snapshot.path / name for name in _OWN} | layers
    known |= {layer / name for layer in layers for name in _LAYER}
    if snapshot.depth:
        known.add(ancestry)
    litter = Litter()
    for directory in (snapshot.path, *([ancestry, *sorted(layers)] if snapshot.depth else ())):
        for path in _entries(directory):
            if path not in known:
                litter.stranger(path, snapshot=surveyed.tag)
    litter.findings.extend(check_modes(snapshot.path, snapshot=surveyed.tag))
    return litter if surveyed.exists() else Litter()


def check_modes(*directories: Path, snapshot: str | None = None) -> Iterator[Finding]:
    """Directories that others can enter: memory holds secrets."""
    for directory in directories:
        with suppress(FileNotFoundError):
            if directory.stat().st_mode & 0o077:
                what = "other users can enter it; its mode must be 0700"
                yield Finding.of(Kind.MODE, directory, what, snapshot=snapshot)


def is_directory_held(path: Path) -> bool:
    """Whether somebody has the flock of a directory. The caller must hold the store's lock.

    FileNotFoundError: it is gone, or was renamed by its holder, before letting go.
    """
    lock = files.try_lock_directory(path)
    if lock is None:
        return True
    try:
        found = os.fstat(lock)
        if identity_of(path) != (found.st_dev, found.st_ino):
            raise FileNotFoundError(path)
    finally:
        os.close(lock)
    return False


@contextmanager
def image_lock(store: Store, root: str) -> Iterator[bool]:
    """Hold the lock of the image of `root`, if nobody else does; whether that is so."""
    try:
        fd = os.open(store.images / f".{root[:2]}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def is_temporary(path: Path) -> bool:
    """Whether it has a name that Ratoon gives to files until they are renamed into place."""
    return bool(_TEMPORARY.fullmatch(path.name))


def is_temporary_held(path: Path) -> bool:
    """Whether the thread that wrote a temporary file may still be about to rename it."""
    match = _TEMPORARY.fullmatch(path.name)
    return match is not None and Path("/proc", match["thread"]).exists()


def _awaits_owner(sandbox: Path) -> bool:
    """Whether a sandbox that nobody holds has a record, for the next daemon to take it over."""
    try:
        record = json.loads((sandbox / SANDBOX_RECORD).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("id") == sandbox.name


def _check_template(path: Path, size: int) -> Iterator[Finding]:
    try:
        found = check_header(path, label="the template").virtual_size
    except FileNotFoundError:
        return
    except RatoonError as error:
        yield Finding.of(Kind.TEMPLATE, path, str(error))
    except OSError as error:
        yield Finding.of(Kind.TEMPLATE, path, unreadable(error))
    else:
        if found != size:
            yield Finding.of(Kind.TEMPLATE, path, f"a disk of {found} bytes, not of {size}")


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_directory(path: Path) -> bool:
    with suppress(FileNotFoundError):
        return stat.S_ISDIR(path.lstat().st_mode)
    return False
