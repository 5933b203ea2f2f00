"""The check of a whole store: is everything there, does it fit, is it what its digests say.

Nothing is changed, and others may go on meanwhile: what they delete is no finding, and what they
hold is not judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon.errors import Corrupt, Incompatible, RatoonError
from ratoon.files import Stamp
from ratoon.store.check.findings import Finding, Kind, Report, unreadable
from ratoon.store.check.image_check import Images, check_images, list_images
from ratoon.store.check.inventory import StoredFile, Surveyed, take_inventory
from ratoon.store.check.litter import find_litter, find_strangers
from ratoon.store.check.scrub import (
    Slice,
    Unit,
    check_content,
    disk_unit,
    flat_disk_unit,
    image_units,
    memory_units,
    scrub,
)
from ratoon.store.check.structure import (
    Head,
    Indexes,
    check_indexes,
    check_relations,
    digests_of,
    is_snapshot_directory,
    prove_chains,
    survey,
)
from ratoon.store.disk.qcow2 import check_header
from ratoon.store.memory.cache import KINDS
from ratoon.store.snapshot.progress import ByteProgress, unheard
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.store_format import claim_format
from ratoon.store.snapshot.verify import Stamps, read_stamps


def check_store(
    store: Store, *, read_data: Slice | None = None, progress: ByteProgress = unheard
) -> Report:
    """Check all that is in `store`, which need not have been opened.

    Without `read_data`, manifests, indexes, chains, device states and what their stamps do not
    vouch for is read; with it, the pages, disks and images of that slice are compared with their
    digests too, and `progress` is told the bytes. Incompatible: a store of another format.
    """
    if not store.home.is_dir():
        return Report()
    findings = [*_check_format(store)]
    listed = list_images(store)  # first: an image is made after its snapshot was published
    litter = find_litter(store)
    surveyed, broken = survey(store)
    for entry in surveyed:
        litter.add(find_strangers(entry))
    for path in sorted(store.snapshots.glob("*")):
        if not is_snapshot_directory(path):
            litter.stranger(path)
    inventory, misfits = take_inventory(surveyed)
    broken_tags = frozenset(finding.snapshot for finding in broken if finding.snapshot)
    indexes = Indexes()
    sound, damaged = check_indexes(inventory, indexes)
    heads: dict[str, Head] = {}
    findings += [
        *(*broken, *misfits, *damaged),
        *check_relations(surveyed, broken_tags),
        *prove_chains(surveyed, sound, indexes, heads),
    ]
    unread, in_small = _check_small(surveyed, inventory)
    findings += in_small
    images = check_images(store, listed, surveyed, heads, all_known=not broken)
    done = 0
    if read_data:
        units = _units(dict.fromkeys(sound.values()), unread, images, indexes)
        found, done = scrub(units, read_data, progress)
        findings += found
    findings += [*images.findings, *litter.findings]
    return Report(
        findings=tuple(findings),
        snapshots=len(surveyed) + len(broken),
        images=sum(path.suffix in KINDS for path in listed),
        bytes_read=done,
        in_use=tuple(sorted({*litter.in_use, *images.in_use})),
    )


def _check_format(store: Store) -> Iterator[Finding]:
    path = store.home / "store.json"
    content = (store.snapshots, store.staging, store.images, store.sandboxes)
    missing = not path.exists()
    if missing and not any(any(directory.glob("*")) for directory in content):
        return  # nothing was ever stored; the format would be claimed
    try:
        claim_format(store.home, content)
    except Incompatible as error:
        if not missing:
            raise
        yield Finding.of(Kind.STORE, path, str(error))
    except Corrupt as error:
        yield Finding.of(Kind.STORE, path, str(error))
    except OSError as error:
        yield Finding.of(Kind.STORE, path, unreadable(error))


def _check_small(
    surveyed: Sequence[Surveyed], inventory: Sequence[StoredFile]
) -> tuple[list[StoredFile], list[Finding]]:
    """Check device states, the headers of disks, and disks that no stamp vouches for.

    The disks that have not been read, and findings.
    """
    stamps = {entry.snapshot.path: _stamps(entry) for entry in surveyed}
    unread, findings = [], []
    for file in inventory:
        found: list[Finding] = []
        if file.expected.kind is Kind.VMSTATE:
            found = [*check_content(file)]
        elif file.expected.kind is Kind.DISK:
            found = [*_check_disk_header(file)]
            if not found and _is_vouched_for(file, stamps):
                unread.append(file)
            elif not found:
                found = [*check_content(file)]
        findings += found
    return unread, findings


def _check_disk_header(file: StoredFile) -> Iterator[Finding]:
    try:
        with file.opened() as path:
            check_header(path, label="disk layer")
        return
    except FileNotFoundError:
        return
    except RatoonError as error:
        what = str(error)
    except OSError as error:
        what = unreadable(error)
    if file.exists():
        yield file.finding(what)


def _stamps(entry: Surveyed) -> Stamps:
    try:
        return read_stamps(entry.snapshot.path)
    except OSError:  # a cache: without it the layers are read
        return {}


def _is_vouched_for(file: StoredFile, stamps: dict[Path, Stamps]) -> bool:
    """Whether a snapshot has the stamp of the file as it is: then it was read before."""
    for name in file.names:
        for directory in (name.parent, name.parent.parent.parent):
            if known := stamps.get(directory):
                try:
                    stamp = Stamp.of(name, with_ctime=False)
                except OSError:
                    continue
                same = (stamp.device, stamp.inode) == file.identity
                if same and known.get(str(name.relative_to(directory))) == stamp:
                    return True
    return False


def _units(
    layers: Iterable[StoredFile],
    disks: Iterable[StoredFile],
    images: Images,
    indexes: Indexes,
) -> Iterator[Unit]:
    """All data of the store, piece by piece."""

    @lru_cache(maxsize=1)  # the pieces of an image follow one another
    def digests(head: Head) -> NDArray[np.uint8]:
        return digests_of(head, indexes)

    for file in layers:
        yield from memory_units(file, indexes)
    for file in disks:
        yield disk_unit(file)
    for path, digest in images.disks:
        yield flat_disk_unit(path, digest)
    for path, head in images.sound:
        yield from image_units(path, head.tag, head.ram_pages, partial(digests, head))
