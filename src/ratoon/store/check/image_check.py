"""Are the images of a store what they were when they were made, and does anybody need them?"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ratoon.errors import RatoonError
from ratoon.store.check.findings import Finding, Kind, unreadable
from ratoon.store.check.inventory import Surveyed, identity_of
from ratoon.store.check.litter import image_lock
from ratoon.store.check.structure import Head
from ratoon.store.memory.cache import DISK, KINDS, RAM, is_litter
from ratoon.store.memory.digests import memory_root, zero_array
from ratoon.store.memory.image import ImageStore
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.snapshot.flat_disks import FlatDisks
from ratoon.store.snapshot.snapshot import MANIFEST, Snapshot, load_snapshot
from ratoon.store.snapshot.store import Store


@dataclass
class Images:
    """What was found of images; `sound` are those whose stamps hold, with the chains they show.

    `disks` are those of flattened disks, with the digests that they were made with.
    """

    findings: list[Finding] = field(default_factory=list)
    in_use: list[Path] = field(default_factory=list)
    sound: list[tuple[Path, Head]] = field(default_factory=list)
    disks: list[tuple[Path, str]] = field(default_factory=list)


def list_images(store: Store) -> list[Path]:
    """The images and the stamps of images, by name."""
    return sorted(path for path in store.images.glob("[!.]*") if path.suffix in (*KINDS, ".json"))


def check_images(
    store: Store,
    listed: Sequence[Path],
    surveyed: Sequence[Surveyed],
    heads: Mapping[str, Head],
    *,
    all_known: bool,
) -> Images:
    """Check the stamps of the images `listed` before the snapshots were `surveyed`.

    Where not `all_known`, because a manifest cannot be read, no image is called unused.
    """
    images = Images()
    needed = _needed_roots(store, surveyed)
    for path in listed:
        with image_lock(store, path.stem) as free:
            if not free:
                images.in_use.append(path)
            elif path.suffix in KINDS:
                _check_image(store, path, heads, needed, all_known, images)
            elif path.exists() and is_litter(path):
                what = "the stamp of an image that is gone"
                images.findings.append(Finding.of(Kind.LITTER, path, what))
    return images


def _check_image(
    store: Store,
    path: Path,
    heads: Mapping[str, Head],
    needed: Mapping[str, str],
    all_known: bool,
    images: Images,
) -> None:
    root = path.stem
    identity = identity_of(path)
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            kind, what = Kind.ORPHAN, "not a regular file"
        elif not path.with_suffix(".json").exists():
            kind, what = Kind.LITTER, "an image whose making was interrupted: it has no stamp"
        else:
            sound, all_zero = _find_sound(store, path, found.st_size, heads, images)
            if sound:
                if all_zero or root in needed or not all_known:
                    return
                whose = "this memory" if path.suffix == RAM else "these layers of a disk"
                kind, what = Kind.UNUSED_IMAGE, f"no snapshot has {whose}"
            else:
                kind, what = Kind.IMAGE, "it was changed since it was made from what was checked"
    except FileNotFoundError:
        return
    except OSError as error:
        kind, what = Kind.IMAGE, unreadable(error)
    if identity_of(path) == identity:
        images.findings.append(Finding.of(kind, path, what, snapshot=needed.get(root)))


def _find_sound(
    store: Store, path: Path, size: int, heads: Mapping[str, Head], images: Images
) -> tuple[bool, bool]:
    """Whether the stamp of an image holds, and whether it is that of all-zero RAM."""
    root = path.stem
    if path.suffix == DISK:
        flats = FlatDisks(store.images)
        sound = flats.find(root) is not None
        if sound and (digest := flats.digest(root)):
            images.disks.append((path, digest))
        return sound, False
    head = heads.get(root) or _zero_head(root, size)
    sound = bool(ImageStore(store.images).find(root, head.ram_pages if head else size // PAGE_SIZE))
    if sound and head:
        images.sound.append((path, head))
    return sound, head is not None and not head.files


def _zero_head(root: str, size: int) -> Head | None:
    """All-zero RAM, from which bases are booted, is the head of no layers."""
    ram_pages = size // PAGE_SIZE
    if memory_root(zero_array(ram_pages)) != root:
        return None
    return Head("", (), ram_pages)


def _needed_roots(store: Store, surveyed: Sequence[Surveyed]) -> dict[str, str]:
    """Roots whose images may be mapped, and the tag of a snapshot that has each."""
    snapshots: list[Snapshot] = [entry.snapshot for entry in surveyed]
    for manifest in store.sandboxes.glob(f"*/*/{MANIFEST}"):  # twins, maybe of deleted snapshots
        with suppress(RatoonError, OSError):
            snapshots.append(load_snapshot(manifest.parent))
    needed = {}
    for snapshot in snapshots:
        layers = snapshot.manifest.layers
        for layer, disk_root in zip(layers, snapshot.manifest.disk_roots, strict=True):
            needed[layer.memory_root] = needed[disk_root] = layer.tag
    return needed
