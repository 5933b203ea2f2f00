"""Files re-made from what is left of them: copies of the same content, images, intact pages.

Only the digests in the manifest decide what is the same content. The new file is finished, flushed
and read back before it takes the place of the damaged one under each of its names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ratoon import files
from ratoon.errors import CannotRestore, RatoonError
from ratoon.store.check.findings import Kind
from ratoon.store.check.inventory import Expected, Identity, expected_files, identity_of
from ratoon.store.check.scrub import GRAIN, digest_of, read_image
from ratoon.store.memory.chain import Link, resolve
from ratoon.store.memory.digests import (
    are_stored,
    digests_differ,
    hash_pages,
    memory_root,
    zero_array,
)
from ratoon.store.memory.page import PAGE_SIZE
from ratoon.store.memory.pageset import PageIndex, read_index, read_pages
from ratoon.store.memory.writing import write_page_stream
from ratoon.store.snapshot.links import ram_pages
from ratoon.store.snapshot.snapshot import ANCESTRY, MANIFEST, VERIFIED, Snapshot, load_snapshot
from ratoon.store.snapshot.store import Store

#: Gives the pages of entries of an index as it has them, right or wrong: (k,) to (k, 4096).
Source = Callable[[NDArray[np.int64]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Lost:
    """A file of `snapshot` that is not as the manifest says; `layer` is the one it belongs to."""

    snapshot: Snapshot
    path: Path
    expected: Expected
    layer: int


def locate(store: Store, path: Path) -> Lost:
    """What the file `path` of a published snapshot must be. CannotRestore: no manifest says so."""
    tag = path.relative_to(store.snapshots).parts[0]
    try:
        snapshot = store.get(tag)
    except (RatoonError, OSError) as error:
        raise CannotRestore(f"without the manifest nobody knows what it was: {error}") from error
    for name, expected in expected_files(snapshot):
        if name == path:
            below = path.parent.parent.name == ANCESTRY
            layer = int(path.parent.name) if below else snapshot.depth
            return Lost(snapshot, path, expected, layer)
    raise CannotRestore(f"the manifest of snapshot {tag} does not speak of it")


def all_snapshots(store: Store) -> Iterator[Snapshot]:
    """Every snapshot directory with a sound manifest, those of sandboxes too."""
    for parent, pattern in ((store.snapshots, "*"), (store.sandboxes, "*/*")):
        for manifest in sorted(parent.glob(f"{pattern}/{MANIFEST}")):
            with suppress(RatoonError, OSError):
                yield load_snapshot(manifest.parent)


def matches(path: Path, expected: Expected) -> bool:
    """Whether the whole of `path` is what the manifest says; reads it."""
    try:
        if not path.is_file() or path.is_symlink():
            return False
        if expected.kind is not Kind.MEMORY:
            return digest_of(path) == expected.digest
        index = read_index(path, label="layer", expected_digest=expected.digest)
        for _ in read_pages(path, index, None, label="layer"):
            pass
    except (RatoonError, OSError):
        return False
    return True


def restore(store: Store, lost: Lost, directory: Path) -> str:
    """Make the content of `lost` again under all names of the damaged file; from what, in words.

    `directory` is on the store's file system and the caller's own. CannotRestore: nothing has the
    content; then nothing was changed. OSError.
    """
    if lost.path.is_dir():
        raise CannotRestore("a directory is in its place; move that elsewhere")
    damaged = identity_of(lost.path)
    if matches(lost.path, lost.expected):
        return "it is sound by now"
    good = directory / "restored"
    good.unlink(missing_ok=True)
    source = _copy(store, lost, damaged, good)
    if source is None and lost.expected.kind is Kind.MEMORY:
        source = _remake(store, lost, good)
    if source is None:
        raise CannotRestore("there is no other file with the content that its digest says")
    if not matches(good, lost.expected):
        good.unlink()
        raise CannotRestore("what was made of the other files does not match its digest either")
    replace_names(store, lost.path, damaged, good)
    return source


def replace_names(store: Store, path: Path, damaged: Identity | None, good: Path) -> None:
    """Put `good` in the place of `path`, and of each other name in the store of that inode.

    Each name changes at once; whoever has the old file open keeps it. Then `good` is gone.
    """
    next_name = good.with_name("next")
    next_name.unlink(missing_ok=True)
    with files.locked(store.lock):  # nobody deletes, and no name is made by claiming
        while names := [path] if damaged is None else _names_of(store, damaged):
            for name in names:
                files.link_or_copy(good, next_name)
                try:
                    next_name.rename(name)
                except FileNotFoundError:  # published or removed meanwhile; looked for again
                    next_name.unlink()
                    continue
                files.fsync_path(name.parent)
                _forget_stamps(name)
            if damaged is None:
                break
    good.unlink()


def _names_of(store: Store, identity: Identity) -> list[Path]:
    found = []
    for root in (store.snapshots, store.staging, store.sandboxes):
        for directory, _, names in os.walk(root):
            paths = (Path(directory, name) for name in names)
            found += [path for path in paths if identity_of(path) == identity]
    return found


def _forget_stamps(name: Path) -> None:
    below = name.parent.parent.name == ANCESTRY
    directory = name.parent.parent.parent if below else name.parent
    (directory / VERIFIED).unlink(missing_ok=True)
    files.fsync_path(directory)


def _candidates(store: Store, lost: Lost, damaged: Identity | None) -> Iterator[Path]:
    """Other files that manifests say have the same content."""
    seen = {damaged, None}
    wanted = lost.expected
    for snapshot in all_snapshots(store):
        for path, expected in expected_files(snapshot):
            same = (expected.kind, expected.digest) == (wanted.kind, wanted.digest)
            if same and (identity := identity_of(path)) not in seen:
                seen.add(identity)
                yield path


def _copy(store: Store, lost: Lost, damaged: Identity | None, good: Path) -> str | None:
    for path in _candidates(store, lost, damaged):
        if matches(path, lost.expected):
            files.link_or_copy(path, good)
            return f"from {path}"
    return None


def _remake(store: Store, lost: Lost, good: Path) -> str | None:
    """Write the layer from every page of it that is anywhere."""
    layers = [lost.path, *_candidates(store, lost, identity_of(lost.path))]
    images = _images(store, ram_pages(lost.snapshot))
    index = _index(store, lost, layers)
    if index is None:
        raise CannotRestore("its index is damaged, and there is no copy and no image to tell it")
    with ExitStack() as stack:
        sources: list[Source] = []
        for read, paths in ((_read_layer, layers), (_read_ram, images)):
            for path in paths:
                with suppress(OSError):
                    fd = stack.enter_context(path.open("rb")).fileno()
                    sources.append(partial(read, Path(f"/proc/self/fd/{fd}"), index))
        content = _content(index, sources)
        write_page_stream(good, index.ram_pages, index.numbers, index.digests, content)
    return "from its own sound pages, copies and images"


def _index(store: Store, lost: Lost, layers: Sequence[Path]) -> PageIndex | None:
    for path in layers:
        with suppress(RatoonError, OSError):
            return read_index(path, label="layer", expected_digest=lost.expected.digest)
    with suppress(RatoonError, OSError):
        return _index_of_image(store, lost)
    return None


def _index_of_image(store: Store, lost: Lost) -> PageIndex | None:
    """What differs between the chain below and the image of the chain up to here.

    It is taken on trust here, and judged by its digest once it is written.
    """
    root = lost.snapshot.manifest.layers[lost.layer].memory_root
    pages = ram_pages(lost.snapshot)
    below = resolve(_links_below(lost), pages)
    array = np.empty_like(zero_array(pages))
    with (store.images / f"{root}.ram").open("rb", buffering=0) as image:
        for first in range(0, pages, GRAIN):
            count = min(GRAIN, pages - first)
            array[first : first + count] = hash_pages(read_image(image.fileno(), first, count))
    if memory_root(array) != root:
        return None
    numbers = np.flatnonzero(digests_differ(array, below))
    return PageIndex(pages, numbers.astype(np.uint64), array[numbers], lost.expected.digest)


def _links_below(lost: Lost) -> list[Link]:
    links = []
    for number, layer in enumerate(lost.snapshot.manifest.layers[: lost.layer]):
        path = lost.snapshot.memory_path(number)
        index = read_index(path, label=layer.tag, expected_digest=layer.memory.index_digest)
        links.append(Link(layer.tag, path, index, layer.memory_root))
    return links


def _images(store: Store, pages: int) -> list[Path]:
    found = []
    for path in sorted(store.images.glob("[!.]*.ram")):
        with suppress(OSError):
            if path.stat().st_size == pages * PAGE_SIZE:
                found.append(path)
    return found


def _read_layer(path: Path, index: PageIndex, entries: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The pages of entries (k,), as the layer at `path` has them: zeros where it is damaged."""
    found = np.zeros((len(entries), PAGE_SIZE), np.uint8)
    for rows in (slice(None), *(slice(row, row + 1) for row in range(len(entries)))):
        with suppress(RatoonError, OSError):
            for _, pages in read_pages(path, index, entries[rows], label="layer"):
                found[rows] = pages
            if rows == slice(None):
                break
    return found


def _read_ram(path: Path, index: PageIndex, entries: NDArray[np.int64]) -> NDArray[np.uint8]:
    """As `_read_layer`, as the image at `path` has them, checked against nothing."""
    found = np.zeros((len(entries), PAGE_SIZE), np.uint8)
    with path.open("rb", buffering=0) as image:
        for row, number in enumerate(index.numbers[entries].tolist()):
            with suppress(OSError):
                os.preadv(image.fileno(), [found[row].data], number * PAGE_SIZE)
    return found


def _content(
    index: PageIndex, sources: Sequence[Source]
) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """The pages that have data, each from the first source where it matches its digest."""
    stored = np.flatnonzero(are_stored(index.digests))
    for first in range(0, len(stored), GRAIN):
        entries = stored[first : first + GRAIN]
        pages = np.zeros((len(entries), PAGE_SIZE), np.uint8)
        missing = np.arange(len(entries))
        for read in sources:
            pages[missing] = read(entries[missing])
            wrong = digests_differ(hash_pages(pages[missing]), index.digests[entries[missing]])
            missing = missing[wrong]
            if not len(missing):
                break
        else:
            lost = ", ".join(map(str, index.numbers[entries[missing]][:8]))
            raise CannotRestore(f"no copy and no image has page {lost}")
        yield index.numbers[entries], pages
