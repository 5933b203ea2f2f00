"""Disk usage: what each snapshot, image, sandbox and volume takes, and shares with others.

Every inode counts once, by its blocks: so holes count nothing, and neither do further names. Data
that several inodes share (reflinks) counts once too, by its place on the device. To each byte
belong those that hold it; who is its only holder would free it by going.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import ELOOP, ENAMETOOLONG, ENOENT, ENOTDIR
from pathlib import Path

from ratoon.errors import NotFound
from ratoon.store.snapshot.extents import shared_extents
from ratoon.store.snapshot.manifest import check_tag
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store

#: Holds what has names, or shared data, outside the store.
_OUTSIDE = "outside"
_BLOCK = 512  # of st_blocks, on every file system

#: How many bytes have exactly these holders.
Charges = Mapping[frozenset[str], int]


@dataclass(frozen=True)
class Usage:
    """In bytes: `own` is what would become free if this alone were deleted, `shared` the rest."""

    own: int
    shared: int

    @property
    def total(self) -> int:
        return self.own + self.shared


@dataclass(frozen=True)
class StoreUsage:
    """The usage of everything in a store; `total` is in bytes, each counted once.

    `snapshots` by tag, each with its images, which go with it unless another snapshot has the same
    memory, or disk; `images` by memory root or disk root, `sandboxes` by id and named `volumes` by
    name, each of itself; `other`: staging, templates and the store's own files.
    """

    total: int
    snapshots: Mapping[str, Usage]
    images: Mapping[str, Usage]
    sandboxes: Mapping[str, Usage]
    volumes: Mapping[str, Usage]
    other: Usage


@dataclass
class _Inode:
    """One inode, any of its names in the store, and all who have a name for it there."""

    status: os.stat_result
    path: Path
    names: int = 0
    holders: set[str] = field(default_factory=set)

    def all_holders(self) -> frozenset[str]:
        has_others = stat.S_ISREG(self.status.st_mode) and self.status.st_nlink > self.names
        return frozenset(self.holders | ({_OUTSIDE} if has_others else set()))

    def shared_extents(self) -> list[tuple[int, int]]:
        if not stat.S_ISREG(self.status.st_mode) or not self.status.st_blocks:
            return []
        with _while_it_changes():
            return shared_extents(self.path)
        return []


def usage(store: Store) -> StoreUsage:
    """The usage of all that a store has. What vanishes meanwhile is left out."""
    found = charges(store)
    names = {name for group in found for name in group}

    def each(kind: str) -> dict[str, Usage]:
        of_kind = sorted(name for name in names if name.startswith(f"{kind}/"))
        return {name.partition("/")[2]: _usage(found, {name}, {name}) for name in of_kind}

    images: dict[str, set[str]] = {}
    having: Counter[str] = Counter()  # a flattened disk may be the beginning of another's layers
    for entry in store.list():
        if isinstance(entry, Snapshot):
            manifest = entry.manifest
            roots = (manifest.memory_root, manifest.disk_root)
            images[manifest.tag] = {f"image/{root}" for root in roots}
            having.update({f"image/{root}" for root in (roots[0], *manifest.disk_roots)})
    snapshots = {}
    for tag in each("snapshot"):
        own = {f"snapshot/{tag}"}
        with_it = images.get(tag, set())
        alone = {image for image in with_it if having[image] == 1}
        snapshots[tag] = _usage(found, own | with_it, own | alone)
    return StoreUsage(
        total=sum(found.values()),
        snapshots=snapshots,
        images=each("image"),
        sandboxes=each("sandbox"),
        volumes=each("volume"),
        other=_usage(found, {"other"}, {"other"}),
    )


def charges(store: Store) -> Charges:
    """How many bytes of a store have exactly which holders.

    Those are `snapshot/TAG`, `image/ROOT`, `sandbox/ID` and `volume/NAME`, `other` for the rest of
    the store, and `outside`. What vanishes meanwhile is left out.
    """
    return _charge(_inodes(store.home))


def snapshot_usage(store: Store, tag: str) -> Usage:
    """The usage of one snapshot; for that, all of the store must be looked at. NotFound."""
    check_tag(tag)
    found = usage(store).snapshots.get(tag)
    if found is None:
        store.get(tag)
        raise NotFound(f"snapshot {tag} was deleted meanwhile")
    return found


def _usage(charges: Charges, holds: set[str], alone: set[str]) -> Usage:
    """Of what any of `holds` holds: what only `alone` do, and the rest."""
    total = sum(size for holders, size in charges.items() if holders & holds)
    own = sum(size for holders, size in charges.items() if holders <= alone)
    return Usage(own, total - own)


def _inodes(home: Path) -> Iterable[_Inode]:
    """Every file and directory below `home`."""
    found: dict[tuple[int, int], _Inode] = {}
    pending = [(home, "other")]
    while pending:
        path, holder = pending.pop()
        with _while_it_changes():
            status = path.lstat()
            below = [*path.iterdir()] if stat.S_ISDIR(status.st_mode) else []
            inode = found.setdefault((status.st_dev, status.st_ino), _Inode(status, path))
            inode.names += 1
            inode.holders.add(holder)
            pending += [(name, _holder(name.relative_to(home))) for name in below]
    return found.values()


@contextmanager
def _while_it_changes() -> Iterator[None]:
    """What is gone, or something else by now, is left out of the block.

    So is what guests have put deeper into their volumes than a path is long.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOENT, ENOTDIR, ELOOP, ENAMETOOLONG):
            raise


def _holder(path: Path) -> str:
    """Whose a path relative to the store's directory is."""
    match path.parts:
        case ("snapshots", tag, *_):
            return f"snapshot/{tag}"
        case ("sandboxes", sandbox, *_):
            return f"sandbox/{sandbox}"
        case ("images", name) if not name.startswith("."):
            return f"image/{path.stem}"
        case ("volumes", name, *_) if not name.startswith("."):
            return f"volume/{name}"
    return "other"


def _charge(inodes: Iterable[_Inode]) -> Charges:
    charges: Counter[frozenset[str]] = Counter()
    #: By device: where a shared extent begins (1) or ends (-1), and of which holders.
    edges: defaultdict[int, list[tuple[int, int, frozenset[str]]]] = defaultdict(list)
    for inode in inodes:
        holders = inode.all_holders()
        private = inode.status.st_blocks * _BLOCK
        for start, end in inode.shared_extents():
            private -= end - start
            edges[inode.status.st_dev] += [(start, 1, holders), (end, -1, holders)]
        charges[holders] += max(private, 0)
    for of_device in edges.values():
        for size, groups in _sweep(of_device):
            charges[frozenset().union(*groups)] += size
    return charges


def _sweep(
    edges: list[tuple[int, int, frozenset[str]]],
) -> Iterator[tuple[int, list[frozenset[str]]]]:
    """The length of each stretch of the device, and the holders of each that refers to it."""
    referring: Counter[frozenset[str]] = Counter()
    before = 0
    for at, step, holders in sorted(edges, key=lambda edge: edge[:2]):
        if at > before and (count := referring.total()):
            # It is shared, so a single reference means that the other is not in the store.
            outside = [frozenset([_OUTSIDE])] if count == 1 else []
            yield at - before, [*referring, *outside]
        before = at
        referring[holders] += step
        if not referring[holders]:
            del referring[holders]
