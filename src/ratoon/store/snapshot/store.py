"""The store: all snapshots of one home directory, shared by any number of processes.

::

    store.json           the layout's format
    .lock                held while staging directories are claimed, deleted or swept
    snapshots/TAG/       published, immutable
    staging/TAG/         being built; held by its flock
    images/ sandboxes/ templates/

Nothing here counts references: each snapshot directory has hard links to all it needs.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ratoon import files
from ratoon.api.snapshots import SnapshotDetail
from ratoon.errors import (
    Corrupt,
    HasDependents,
    Incompatible,
    InFlight,
    InvalidInput,
    NotFound,
    RatoonError,
)
from ratoon.store.snapshot.descent import leaves_first
from ratoon.store.snapshot.manifest import Manifest, check_tag
from ratoon.store.snapshot.snapshot import Snapshot, load_snapshot
from ratoon.store.snapshot.staging import Staging, already_exists, remove_unheld
from ratoon.store.snapshot.store_format import claim_format

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BrokenSnapshot:
    """A snapshot that cannot be read, and why."""

    tag: str
    error: RatoonError | OSError


class Store:
    """The snapshots below one home directory. Get one with `Store.open`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.snapshots = home / "snapshots"
        self.staging = home / "staging"
        self.images = home / "images"
        self.sandboxes = home / "sandboxes"
        self.templates = home / "templates"
        self.lock = home / ".lock"

    @classmethod
    def open(cls, home: Path) -> Store:
        """Open the store in `home`, making it if need be, and remove what crashes left in staging.

        What another process works on is not touched. Incompatible: a store of another format, or
        of one that nothing tells. Corrupt: its `store.json` is not what Ratoon wrote. HostError:
        it belongs to another user.
        """
        store = cls(home.absolute())
        store.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        files.require_own(store.home)
        with files.locked(store.lock):
            content = (store.snapshots, store.staging, store.images, store.sandboxes)
            claim_format(store.home, content)
            for directory in (
                *(store.snapshots, store.staging),
                *(store.images, store.sandboxes, store.templates),
            ):
                directory.mkdir(mode=0o700, exist_ok=True)
            for leftover in store.staging.iterdir():
                if leftover.is_dir() and remove_unheld(leftover):
                    log.info("removed unfinished work: %s", leftover)
        return store

    @contextmanager
    def stage(self, tag: str, *, replace: bool = False) -> Iterator[Staging]:
        """A staging directory for a new snapshot, removed on leaving unless it was published.

        AlreadyExists: there is such a snapshot, and it is not to be replaced (`Staging.replace`).
        InFlight: somebody is making it. InvalidInput: not a tag.
        """
        check_tag(tag)
        staging = Staging(self.staging / tag, tag, self.snapshots / tag)
        lock = self._claim(tag, replace)
        try:
            yield staging
        finally:
            try:
                if not staging.published:
                    shutil.rmtree(staging.path)
            finally:
                os.close(lock)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new, empty directory of mode 0700, gone with all its content on leaving.

        It lies in staging, on the file system of the snapshots, so their files can be linked into
        it; one that a crash left behind goes when the store is opened next.
        """
        path = self.staging / f".scratch-{secrets.token_hex(8)}"  # no tag begins with a dot
        with files.locked(self.lock):
            path.mkdir(mode=0o700)
            lock = files.try_lock_directory(path)
        assert lock is not None, "nobody sweeps without the store's lock"
        try:
            yield path
        finally:
            try:
                shutil.rmtree(path)
            finally:
                os.close(lock)

    def require_free(self, tag: str) -> None:
        """AlreadyExists if there is a snapshot `tag`, InvalidInput if it can be no tag.

        For those who would do long work before they publish; publishing itself asks again.
        """
        check_tag(tag)
        if os.path.lexists(self.snapshots / tag):
            raise already_exists(tag)

    def get(self, tag: str) -> Snapshot:
        """The snapshot `tag`. Corrupt or Incompatible: its manifest cannot be used.

        NotFound: there is none. InFlight: it is being made at this moment.
        """
        try:
            return self._get(tag)
        except NotFound:
            if self._is_in_flight(tag):
                raise InFlight(f"snapshot {tag} is still being made; try again") from None
            raise

    def _get(self, tag: str) -> Snapshot:
        check_tag(tag)
        path = self.snapshots / tag
        try:
            snapshot = load_snapshot(path)
        except Corrupt:
            if not os.path.lexists(path):
                raise _not_found(tag) from None
            raise
        if snapshot.manifest.tag != tag:
            raise Corrupt(
                f"snapshot {tag}: its manifest says that it is snapshot {snapshot.manifest.tag}; "
                f"rename {path} back"
            )
        return snapshot

    def list(self) -> tuple[Snapshot | BrokenSnapshot, ...]:
        """All snapshots by tag; one that is damaged does not hide the others."""
        found: list[Snapshot | BrokenSnapshot] = []
        for path in sorted(self.snapshots.iterdir()):
            try:
                found.append(self._get(path.name))
            except NotFound:  # deleted meanwhile
                continue
            except (RatoonError, OSError) as error:
                found.append(BrokenSnapshot(path.name, error))
        return tuple(found)

    def find(self, fits: Callable[[Snapshot], bool]) -> Snapshot | None:
        """The first snapshot that `fits`; those that are damaged, or go meanwhile, do not."""
        for entry in self.list():
            with suppress(FileNotFoundError):
                if isinstance(entry, Snapshot) and fits(entry):
                    return entry
        return None

    def image_roots(self) -> set[str]:
        """What images are named after: the memory roots of all snapshots, and their disk roots.

        Those of all beginnings of their chains: a flattened disk of one is of use to the whole.
        """
        manifests = [entry.manifest for entry in self.list() if isinstance(entry, Snapshot)]
        memory = {manifest.memory_root for manifest in manifests}
        return memory.union(*(manifest.disk_roots for manifest in manifests))

    def unpublished_roots(self, manifest: Manifest) -> set[str]:
        """The roots of a chain, and of its beginnings, that no snapshot here has."""
        last = manifest.reference
        try:
            published = self.get(last.tag).manifest
        except RatoonError:
            published = None
        if published and published.id == manifest.id:
            return set()
        roots = {manifest.memory_root, *manifest.disk_roots}
        if published and published.id == last.id:
            return roots - {published.memory_root, *published.disk_roots}
        return roots - self.image_roots()  # it was deleted; others may have its layers

    def dependents(self, tag: str) -> tuple[str, ...]:
        """The tags of the snapshots made directly on `tag`. NotFound.

        An earlier snapshot of the same tag does not count, unless this one is too damaged to tell.
        """
        _, dependents, _ = self._family(tag)
        return tuple(manifest.tag for manifest in dependents)

    def delete(self, tag: str, *, force: bool = False, cascade: bool = False) -> tuple[str, ...]:
        """Delete a snapshot, a damaged one too; the tags that were deleted, in that order.

        With dependents: `cascade` deletes all that descends from it before it, leaves first;
        `force` deletes it alone, and what was made from it stays whole; neither is HasDependents,
        both InvalidInput. InFlight: it is being published. NotFound. A crash leaves all of a
        snapshot or nothing, and an error in a cascade those that it did not come to.
        """
        if force and cascade:
            raise InvalidInput(
                f"delete {tag} with cascade (its dependents too) or with force (it alone), not both"
            )
        identity, dependents, manifests = self._family(tag)
        if dependents and not (force or cascade):
            raise HasDependents(tag, [manifest.tag for manifest in dependents])
        deleted = []
        for manifest in leaves_first(dependents, manifests) if cascade else ():
            if manifest.id != identity:
                with suppress(NotFound):  # deleted meanwhile, by somebody else
                    self._remove(manifest.tag, manifest.id)
                    deleted.append(manifest.tag)
        self._remove(tag, identity)
        return (*deleted, tag)

    def _family(self, tag: str) -> tuple[str | None, tuple[Manifest, ...], tuple[Manifest, ...]]:
        """The id of `tag` (None: too damaged to tell), its dependents, and all manifests."""
        try:
            identity = self.get(tag).manifest.id
        except (Corrupt, Incompatible):
            identity = None
        manifests = tuple(entry.manifest for entry in self.list() if isinstance(entry, Snapshot))
        dependents = tuple(
            manifest
            for manifest in manifests
            if (parent := manifest.parent)
            and (parent.id == identity if identity else parent.tag == tag)
        )
        return identity, dependents, manifests

    def _remove(self, tag: str, identity: str | None) -> None:
        """Remove the snapshot directory `tag`, if its id still is `identity` where that is known.

        NotFound: there is none, or it is another snapshot by now. InFlight.
        """
        path = self.snapshots / tag
        doomed = self.staging / f".deleted-{tag}-{secrets.token_hex(4)}"
        with ExitStack() as held:
            with files.locked(self.lock):
                if identity and self._get(tag).manifest.id != identity:
                    raise _not_found(tag)
                try:
                    lock = files.try_lock_directory(path)
                except FileNotFoundError:
                    raise _not_found(tag) from None
                if lock is None:
                    raise InFlight(f"snapshot {tag} is being published; try again")
                held.callback(os.close, lock)
                path.rename(doomed)
            files.fsync_path(self.snapshots)
            files.fsync_path(self.staging)
            shutil.rmtree(doomed)

    def info(self, tag: str) -> SnapshotDetail:
        """All about one snapshot. NotFound; Corrupt if it is too damaged to tell."""
        snapshot = self.get(tag)
        manifest = snapshot.manifest
        try:
            memory = snapshot.memory_path(snapshot.depth).stat()
        except FileNotFoundError as error:
            raise Corrupt(f"snapshot {tag}, file memory.bin: missing") from error
        parent = manifest.parent
        return SnapshotDetail(
            tag=tag,
            dir=str(snapshot.path),
            created_at_unix=int(manifest.created_at_unix),
            memory_logical_bytes=manifest.layers[-1].memory.size,
            memory_physical_bytes=memory.st_blocks * 512,
            vmstate_bytes=manifest.vmstate.size,
            parent_tag=parent.tag if parent else None,
            parent_content_hash=f"blake3:{parent.memory_root}" if parent else None,
            chain_depth=snapshot.depth,
            ancestors=[layer.tag for layer in manifest.ancestors],
            dependents=[*self.dependents(tag)],
        )

    def _is_in_flight(self, tag: str) -> bool:
        with files.locked(self.lock):
            try:
                lock = files.try_lock_directory(self.staging / tag)
            except FileNotFoundError:
                return False
        if lock is not None:
            os.close(lock)
        return lock is None

    def _claim(self, tag: str, replace: bool) -> int:
        """Make staging/TAG and hold it; the descriptor that does."""
        path = self.staging / tag
        with files.locked(self.lock):
            if not replace:
                self.require_free(tag)
            if not remove_unheld(path):
                raise InFlight(f"snapshot {tag} is being made at this moment")
            path.mkdir(mode=0o700)
            lock = files.try_lock_directory(path)
            assert lock is not None, "nobody claims without the store's lock"
            return lock


def _not_found(tag: str) -> NotFound:
    return NotFound(f"no snapshot {tag}; `ratoon images` lists those there are")
