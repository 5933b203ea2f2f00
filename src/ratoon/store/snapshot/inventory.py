"""What a store has, and who needs it, as retention must know it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress

from ratoon.errors import RatoonError
from ratoon.store.snapshot.manifest import Manifest
from ratoon.store.snapshot.retention import Inventory, Member
from ratoon.store.snapshot.snapshot import MANIFEST, Snapshot, load_snapshot
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.usage import charges


def take_inventory(store: Store, users: Mapping[str, str] | None = None) -> Inventory:
    """All snapshots with what each holds and who needs it; `users` by tag, besides sandboxes."""
    standing = sandboxes_by_snapshot(store)
    members, damaged = [], []
    for entry in store.list():
        if isinstance(entry, Snapshot):
            manifest = entry.manifest
            other = (users or {}).get(manifest.tag)
            needed = (*standing.get(manifest.id, ()), *([other] if other else ()))
            members.append(_member(manifest, needed))
        else:
            damaged.append(entry.tag)
    return Inventory(tuple(members), charges(store), tuple(damaged))


def sandboxes_by_snapshot(store: Store) -> Mapping[str, tuple[str, ...]]:
    """Which sandboxes stand on a snapshot, running, waiting or in standby, by its id.

    One that was in standby stands on itself, and so on the last snapshot below.
    """
    found: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for path in sorted(store.sandboxes.glob(f"*/*/{MANIFEST}")):
        with suppress(RatoonError, OSError):  # gone meanwhile, or cannot be used
            reference = load_snapshot(path.parent).manifest.reference
            found[reference.id][f"sandbox {path.parent.parent.name}"] = None
    return {identity: tuple(names) for identity, names in found.items()}


def _member(manifest: Manifest, users: tuple[str, ...]) -> Member:
    base = manifest.layers[0]
    return Member(
        tag=manifest.tag,
        id=manifest.id,
        parent=manifest.parent.id if manifest.parent else None,
        base=base.id,
        base_tag=base.tag,
        created_at_unix=manifest.created_at_unix,
        roots=frozenset({manifest.memory_root, *manifest.disk_roots}),
        users=users,
    )
