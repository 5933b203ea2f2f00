"""Compression at rest: memory layers of cold snapshots compressed where they lie, or plain again.

A layer's identity is its digests, and not its bytes, so its file may change its form. To free any
space, it must under **all** its names: those in its own snapshot, in all that descend from it, and
in sandboxes, found by their inode. The new file is written aside, flushed, and read back before it
takes the place of the first; then each name changes at once. A crash leaves some names with the one
form and some with the other, and either is right: the next run goes on with the file that is there.

Nobody is held up. Who has the old file open reads on, and who opens the name gets the same content.
Names are exchanged, so none comes to be where somebody is deleting, within a directory that is held
open, so that it may be renamed meanwhile.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ratoon import files
from ratoon.api.upkeep import CompressedLayer
from ratoon.artifacts import Progress, silent
from ratoon.compression import LEVEL
from ratoon.errors import Corrupt, HostError, InFlight, NotFound
from ratoon.store.memory.compressed import is_compressed
from ratoon.store.memory.recode import compress_page_set, expand_page_set, read_whole
from ratoon.store.snapshot.snapshot import MEMORY, Snapshot
from ratoon.store.snapshot.staging import exchange
from ratoon.store.snapshot.store import Store
from ratoon.units import MIB, format_mib

Form = Literal["compressed", "plain"]

#: What takes more than this part of what it took is not worth to be decompressed at each use.
WORTH = 7 / 8
_BLOCK = 512  # of st_blocks

#: Device and inode number.
_Inode = tuple[int, int]


@dataclass(frozen=True)
class _Layer:
    """A layer by its index digest; `names` are those in the snapshots that were chosen."""

    tag: str
    digest: str
    names: Sequence[Path]

    @property
    def label(self) -> str:
        return f"snapshot {self.tag}, memory layer"


def rewrite_layers(
    store: Store,
    form: Form,
    tags: Sequence[str] = (),
    *,
    older_than: float | None = None,
    level: int = LEVEL,
    dry_run: bool = False,
    progress: Progress = silent,
) -> tuple[CompressedLayer, ...]:
    """Give the memory layers of snapshots that form: all in their chains; blocks.

    Of the snapshots `tags`, or of all; with `older_than` (seconds) of those made longer ago alone.
    `level` is zstd's. What has the form already is passed over. Needs room for one layer more; a
    dry run too, as it does all but the last step.

    NotFound, Corrupt: one of `tags` is not there, or its manifest is damaged. InFlight: another
    process does this at the moment. A layer that is damaged stays as it is, and its outcome says
    so. OSError, HostError: what was not done yet is as it was.
    """
    with _alone(store), store.scratch() as room:
        done = []
        known = _names_by_inode(store)
        for layer in _choose(store, tags, older_than):
            progress(f"looking at the memory layer of {layer.tag}")
            try:
                found = _rewrite(store, layer, known, form, level, room, dry_run=dry_run)
            except (Corrupt, NotFound) as error:
                found = CompressedLayer(layer.tag, "failed", 0, 0, 0, str(error))
            if found:
                progress(_told(found))
                done.append(found)
        return tuple(done)


def _told(found: CompressedLayer) -> str:
    if found.error:
        return f"{found.tag}: {found.error}"
    return f"{found.tag}: {found.bytes_before / MIB:.1f} to {format_mib(found.bytes_after)}"


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    lock = files.try_lock_directory(store.snapshots)
    if lock is None:
        raise InFlight("another process rewrites the layers of this store; try again later")
    try:
        yield
    finally:
        os.close(lock)


def _choose(store: Store, tags: Sequence[str], older_than: float | None) -> Iterator[_Layer]:
    chosen = [store.get(tag) for tag in tags]
    if not tags:
        chosen = [entry for entry in store.list() if isinstance(entry, Snapshot)]
    if older_than is not None:
        latest = time.time() - older_than
        chosen = [each for each in chosen if each.manifest.created_at_unix <= latest]
    names: defaultdict[str, list[Path]] = defaultdict(list)
    owners: dict[str, str] = {}
    for snapshot in chosen:
        for number, layer in enumerate(snapshot.manifest.layers):
            names[layer.memory.index_digest].append(snapshot.memory_path(number))
            owners.setdefault(layer.memory.index_digest, layer.tag)
    for digest, tag in owners.items():
        yield _Layer(tag, digest, names[digest])


def _names_by_inode(store: Store) -> dict[_Inode, list[Path]]:
    """All names of memory layers in the store."""
    found: defaultdict[_Inode, list[Path]] = defaultdict(list)
    for root in (store.snapshots, store.staging, store.sandboxes):
        for directory, _, names in os.walk(root):
            if MEMORY in names:
                path = Path(directory, MEMORY)
                if inode := _inode(path):
                    found[inode].append(path)
    return found


def _inode(path: Path) -> _Inode | None:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _rewrite(
    store: Store,
    layer: _Layer,
    known: dict[_Inode, list[Path]],
    form: Form,
    level: int,
    room: Path,
    *,
    dry_run: bool,
) -> CompressedLayer | None:
    """Give one layer that form, under all names of all its files; None: it has it."""
    with ExitStack() as held:
        # Held open, so that their numbers stay theirs when their names have gone.
        same, others = _files(layer, form, held)
        if not others:
            return None
        before = sum(_taken(fd) for fd in others.values())
        good = room / "good"
        good.unlink(missing_ok=True)
        if same:
            _link_sound(same, layer, good)
            after = 0  # it is there as it is
        else:
            source = Path(f"/proc/self/fd/{next(iter(others.values()))}")
            if form == "compressed":
                compress_page_set(source, good, layer.digest, level, layer.label)
            else:
                expand_page_set(source, good, layer.digest, layer.label)
            after = good.stat().st_blocks * _BLOCK
        if form == "compressed" and after > before * WORTH:
            good.unlink()
            return CompressedLayer(layer.tag, "kept", before, after, 0, None)
        names = 0
        if not dry_run:
            for inode, fd in others.items():
                names += _replace(store, inode, fd, known.get(inode, ()), good)
        good.unlink()
        return CompressedLayer(layer.tag, form, before, after, names, None)


def _files(
    layer: _Layer, form: Form, held: ExitStack
) -> tuple[dict[_Inode, int], dict[_Inode, int]]:
    """The layer's files that have the form, and those that have not, each open."""
    same: dict[_Inode, int] = {}
    others: dict[_Inode, int] = {}
    for name in layer.names:
        if _inode(name) in same | others:
            continue
        try:
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:  # deleted meanwhile, or missing: a check says which
            continue
        held.callback(os.close, fd)
        status = os.fstat(fd)
        inode = status.st_dev, status.st_ino
        compressed = is_compressed(Path(f"/proc/self/fd/{fd}"), label=layer.label)
        group = same if compressed == (form == "compressed") else others
        group.setdefault(inode, fd)
    return same, others


def _link_sound(candidates: dict[_Inode, int], layer: _Layer, good: Path) -> None:
    """Give the first of a layer's files that is sound another name, to be linked further."""
    for name in layer.names:
        inode = _inode(name)
        if inode in candidates:
            files.link_or_copy(name, good)
            read_whole(good, layer.digest, layer.label)
            return
    raise NotFound(f"{layer.label}: it was deleted meanwhile")


def _taken(fd: int) -> int:
    return os.fstat(fd).st_blocks * _BLOCK


def _replace(store: Store, inode: _Inode, fd: int, names: Sequence[Path], good: Path) -> int:
    """Put `good` in the place of each name of the file that is open at `fd`; how many it were.

    Links are made while this works, but only to names that are there: so it ends, once the file
    has no name left, or none in the store.
    """
    count = 0
    while True:
        count += sum(_exchange(name, inode, good) for name in names)
        if not os.fstat(fd).st_nlink:
            return count
        names = _names_by_inode(store).get(inode, ())
        if not names:
            return count


def _exchange(name: Path, inode: _Inode, good: Path) -> bool:
    """Give the file `good` the place of `name`, if that still is `inode`."""
    try:
        directory = os.open(name.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    new = good.with_name("new")
    try:
        # By the directory itself: it may be renamed at any moment, and another take its name.
        place = Path(f"/proc/self/fd/{directory}", name.name)
        if _inode(place) != inode:
            return False
        files.link_or_copy(good, new)
        try:
            exchange(new, place)
        except FileNotFoundError:  # deleted meanwhile
            return False
        except HostError:
            raise HostError(f"the file system of {name} cannot exchange names") from None
        finally:
            new.unlink()
        os.fsync(directory)
        return True
    finally:
        os.close(directory)
