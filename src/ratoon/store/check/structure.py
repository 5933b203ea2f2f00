"""Do the snapshots of a store fit together: manifests, indexes, chains and their roots."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ratoon.errors import Incompatible, InvalidInput, NotFound, RatoonError
from ratoon.store.check.findings import Finding, Kind, unreadable
from ratoon.store.check.inventory import StoredFile, Surveyed, identity_of
from ratoon.store.memory.chain import overlay
from ratoon.store.memory.digests import memory_root, zero_array
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import PageIndex, read_index
from ratoon.store.snapshot.manifest import LayerRef, check_tag
from ratoon.store.snapshot.snapshot import MANIFEST, MANIFEST_DIGEST, load_snapshot
from ratoon.store.snapshot.store import Store

#: Bytes of indexes kept for the layers used last.
_INDEX_CACHE = 256 * 1024 * 1024


class Indexes:
    """The indexes of memory layers; read again where they are not among those used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, str], PageIndex] = OrderedDict()

    def __call__(self, file: StoredFile) -> PageIndex:
        """Corrupt: it is not what the manifest says. OSError; FileNotFoundError: deleted."""
        key = file.identity, file.expected.digest
        if key not in self._kept:
            with file.opened() as path:
                self._kept[key] = read_index(
                    path, label="memory layer", expected_digest=file.expected.digest
                )
            while sum(map(_size, self._kept.values())) > _INDEX_CACHE and len(self._kept) > 1:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def _size(index: PageIndex) -> int:
    return index.numbers.nbytes + index.digests.nbytes


@dataclass(frozen=True)
class Head:
    """Layers of which it is proven that they give a root; `tag` is the last one's snapshot."""

    tag: str
    files: tuple[StoredFile, ...]
    ram_pages: int


def is_snapshot_directory(path: Path) -> bool:
    """Whether `path`, in snapshots/, is a directory with the name of a snapshot."""
    try:
        check_tag(path.name)
    except InvalidInput:
        return False
    return path.is_dir() and not path.is_symlink()


def survey(store: Store) -> tuple[list[Surveyed], list[Finding]]:
    """All snapshots with a manifest that can be used, and findings for the others."""
    surveyed, findings = [], []
    for path in sorted(store.snapshots.glob("*")):
        if not is_snapshot_directory(path):
            continue
        identity = identity_of(path)
        try:
            surveyed.append(Surveyed(store.get(path.name), identity))
        except NotFound:
            continue
        except (RatoonError, OSError) as error:
            finding = _about_manifest(path, error)
            if identity and identity_of(path) == identity:
                findings.append(finding)
    return surveyed, findings


def _about_manifest(path: Path, error: RatoonError | OSError) -> Finding:
    """The finding about the manifest of the snapshot in `path`, which cannot be used."""
    file = path / MANIFEST
    if isinstance(error, OSError):
        return Finding.of(Kind.MANIFEST, file, unreadable(error), snapshot=path.name)
    if isinstance(error, Incompatible):
        way_out = "use the Ratoon that made it"
        return Finding(Kind.SNAPSHOT, path.name, file, str(error), way_out)
    what = str(error)
    with suppress(RatoonError, OSError):
        tag = load_snapshot(path).manifest.tag
        way_out = f"rename {path} to {path.with_name(tag)}"
        return Finding(Kind.SNAPSHOT, path.name, file, what, way_out)
    if is_digest_damaged(path):
        file = path / MANIFEST_DIGEST
        what = "it is not the digest of manifest.json; it was damaged or edited"
    for name in (MANIFEST, MANIFEST_DIGEST):
        label = f"snapshot {path.name}, file {path / name}: "
        if what.startswith(label):
            file, what = path / name, what.removeprefix(label)
    return Finding.of(Kind.MANIFEST, file, what, snapshot=path.name)


def is_digest_damaged(path: Path) -> bool:
    """Whether manifest.b3 in `path` was damaged, and manifest.json is certain to be intact.

    That is so where most of the right digest is still there: 128 bits do not agree by chance.
    """
    try:
        digest = (path / MANIFEST_DIGEST).read_bytes()
        right = blake3((path / MANIFEST).read_bytes()).hexdigest().encode() + b"\n"
    except OSError:
        return False
    agreeing = sum(a == b for a, b in zip(digest, right, strict=False))
    return digest != right and agreeing >= 32


def check_indexes(
    files: Sequence[StoredFile], indexes: Indexes
) -> tuple[dict[Path, StoredFile], list[Finding]]:
    """The memory layers with a sound index, by each of their names; findings for the others."""
    sound: dict[Path, StoredFile] = {}
    findings = []
    for file in files:
        if file.expected.kind is not Kind.MEMORY:
            continue
        try:
            indexes(file)
        except FileNotFoundError:
            continue
        except OSError as error:
            what = unreadable(error)
        except RatoonError as error:
            what = str(error)
        else:
            sound.update(dict.fromkeys(file.names, file))
            continue
        if file.exists():
            findings.append(file.finding(what))
    return sound, findings


def check_relations(
    surveyed: Sequence[Surveyed], unreadable_tags: frozenset[str]
) -> Iterator[Finding]:
    """Each layer below must be as the snapshot that added it says, while that one is there.

    What no QEMU of today loads is told as well.
    """
    owners = {entry.snapshot.manifest.id: entry for entry in surveyed}
    for entry in surveyed:
        manifest = entry.snapshot.manifest
        path = entry.snapshot.path / MANIFEST
        for layer in manifest.layers[:-1]:
            owner = owners.get(layer.id)
            if not owner:
                continue
            own = owner.snapshot.manifest.layers[-1]
            if own != layer and entry.exists() and owner.exists():
                what = f"its layer {layer.tag} is not that of snapshot {owner.tag}: "
                what += _difference(layer, own)
                yield Finding.of(Kind.SNAPSHOT, path, what, snapshot=entry.tag)
        if manifest.machine.is_outdated and entry.exists():
            what = f"made with QEMU {manifest.machine.qemu_version}, it can be forked no more"
            yield Finding.of(Kind.OUTDATED, path, what, snapshot=entry.tag)
        parent = manifest.parent
        gone = parent and parent.id not in owners and parent.tag not in unreadable_tags
        if parent and gone and entry.exists():
            what = f"its parent {parent.tag} ({parent.id[:8]}) was deleted"
            yield Finding.of(Kind.PARENT_GONE, path, what, snapshot=entry.tag)


def _difference(here: LayerRef, there: LayerRef) -> str:
    ours, theirs = here.model_dump(), there.model_dump()
    name = next(name for name in ours if ours[name] != theirs[name])
    return f"{name} {ours[name]} here, {theirs[name]} there"


def prove_chains(
    surveyed: Sequence[Surveyed],
    sound: Mapping[Path, StoredFile],
    indexes: Indexes,
    heads: dict[str, Head],
) -> Iterator[Finding]:
    """Recompute the roots of every chain link by link; those that are right go into `heads`."""
    for entry in surveyed:
        try:
            what = _prove(entry, sound, indexes, heads)
        except (RatoonError, OSError):  # deleted, or damaged since its index was checked
            continue
        if what and entry.exists():
            path = entry.snapshot.path / MANIFEST
            yield Finding.of(Kind.SNAPSHOT, path, what, snapshot=entry.tag)


def _prove(
    entry: Surveyed,
    sound: Mapping[Path, StoredFile],
    indexes: Indexes,
    heads: dict[str, Head],
) -> str | None:
    snapshot = entry.snapshot
    ram_pages = snapshot.manifest.machine.ram_bytes // PAGE_SIZE
    array = zero_array(ram_pages)
    chain: list[StoredFile] = []
    for number, layer in enumerate(snapshot.manifest.layers):
        file = sound.get(snapshot.memory_path(number))
        if not file:  # a finding of its own; what lies above cannot be proven
            return None
        index = indexes(file)
        if index.ram_pages != ram_pages:
            return (
                f"its layer {layer.tag} is for {index.ram_pages} pages of RAM, "
                f"its machine has {ram_pages}"
            )
        found = len(index.numbers), index.stored
        if found != (layer.memory.entries, layer.memory.stored):
            return (
                f"its layer {layer.tag} has {found[0]} entries, {found[1]} of them stored, but "
                f"the manifest says {layer.memory.entries} and {layer.memory.stored}"
            )
        array = overlay(array, index)
        chain.append(file)
        if (root := memory_root(array)) != layer.memory_root:
            return (
                f"chain link {layer.tag} must have memory root {layer.memory_root}, but its layers "
                f"give {root}: the chain does not fit together"
            )
        heads.setdefault(root, Head(layer.tag, tuple(chain), ram_pages))
    return None


def digests_of(head: Head, indexes: Indexes) -> NDArray[np.uint8]:
    """The digest array of a head, shape (ram_pages, 32). Corrupt, OSError."""
    array = zero_array(head.ram_pages)
    for file in head.files:
        array = overlay(array, indexes(file))
    return array
