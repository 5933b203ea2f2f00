"""Repairs that are provably safe: nothing that matches its digest, or that is held, is touched.

Litter is removed, caches are removed to be made again, modes are set, and damaged files are re-made
where something else has their content. What is left over the next check says.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ratoon import files
from ratoon.errors import CannotRestore, InFlight, RatoonError
from ratoon.store.check.findings import Finding, Kind, Report
from ratoon.store.check.inventory import identity_of
from ratoon.store.check.litter import image_lock, is_temporary, is_temporary_held
from ratoon.store.check.restore import all_snapshots, locate, replace_names, restore
from ratoon.store.check.structure import is_digest_damaged
from ratoon.store.memory.cache import KINDS
from ratoon.store.snapshot.snapshot import (
    MANIFEST,
    MANIFEST_DIGEST,
    Snapshot,
    read_vmstate,
)
from ratoon.store.snapshot.staging import remove_unheld
from ratoon.store.snapshot.store import Store
from ratoon.store.snapshot.verify import check_sizes

_REMAKE = {Kind.MANIFEST, Kind.MEMORY, Kind.DISK, Kind.VMSTATE}
_REMOVE = {Kind.LITTER, Kind.IMAGE, Kind.TEMPLATE}


@dataclass(frozen=True)
class Repair:
    """What is to be done about one file."""

    kind: Kind
    file: Path
    what: str


@dataclass(frozen=True)
class Outcome:
    """How a repair went; `why` says from what it was done, or why it was not."""

    repair: Repair
    done: bool
    why: str


def plan_repairs(report: Report) -> tuple[Repair, ...]:
    """What can be tried about the findings, each file once; manifests first: they say the rest."""
    plan: dict[Path, Repair] = {}
    for finding in sorted(report.findings, key=lambda finding: finding.kind is not Kind.MANIFEST):
        if what := _what_to_do(finding):
            plan.setdefault(finding.file, Repair(finding.kind, finding.file, what))
    return tuple(plan.values())


def _what_to_do(finding: Finding) -> str | None:
    if finding.kind in _REMAKE:
        return "re-make it, if something else has its content"
    if finding.kind in _REMOVE:
        return "remove it"
    return "set its mode" if finding.kind is Kind.MODE else None


def repair_store(
    store: Store, repairs: tuple[Repair, ...], *, sweep_sandboxes: Callable[[], object]
) -> tuple[Outcome, ...]:
    """Do what was planned, as far as it still is right; one that fails stops no other.

    `sweep_sandboxes` removes the sandboxes that nobody holds.
    """
    outcomes = []
    with store.scratch() as directory:
        for repair in repairs:
            try:
                if repair.kind is Kind.MANIFEST:
                    why = _restore_manifest(store, repair.file.parent, directory)
                elif repair.kind in _REMAKE:
                    why = restore(store, locate(store, repair.file), directory)
                elif repair.kind in _REMOVE:
                    why = _remove(store, repair, sweep_sandboxes)
                else:
                    why = _set_mode(repair.file)
            except OSError as error:
                outcomes.append(Outcome(repair, False, files.describe(error)))
            except RatoonError as error:
                outcomes.append(Outcome(repair, False, str(error)))
            else:
                outcomes.append(Outcome(repair, True, why))
    return tuple(outcomes)


def _remove(store: Store, repair: Repair, sweep_sandboxes: Callable[[], object]) -> str:
    path = repair.file
    if is_temporary(path):
        if is_temporary_held(path):
            raise InFlight("it is in use by now")
        path.unlink(missing_ok=True)
    elif path.parent == store.images:
        with image_lock(store, path.name.lstrip(".").partition(".")[0]) as free:
            if not free:
                raise InFlight("it is in use by now")
            half_made = path.suffix == ".tmp"
            for suffix in (".tmp",) if half_made else (".json", *KINDS):
                path.with_suffix(suffix).unlink(missing_ok=True)
    elif path.parent == store.staging:
        with files.locked(store.lock):
            if not remove_unheld(path):
                raise InFlight("it is in use by now")
    elif path.parent == store.sandboxes:
        sweep_sandboxes()
    elif repair.kind is Kind.TEMPLATE:
        path.unlink(missing_ok=True)
    return "removed"


def _set_mode(path: Path) -> str:
    mode = 0o700 if path.is_dir() else path.stat().st_mode & 0o555
    path.chmod(mode)
    return f"mode {mode:#o}"


def _restore_manifest(store: Store, path: Path, directory: Path) -> str:
    """Restore manifest.json and manifest.b3 of the snapshot in `path`, if they are known for sure.

    They are if one of the two is intact and tells the other, or if a twin has both and the device
    state is the twin's.
    """
    with suppress(RatoonError, OSError):
        store.get(path.name)
        return "it is sound by now"
    found = _surviving_manifest(store, path)
    if found is None:
        raise CannotRestore("nothing tells for sure what it was")
    raw, source = found
    digest = blake3(raw).hexdigest().encode() + b"\n"
    for name, content in ((MANIFEST, raw), (MANIFEST_DIGEST, digest)):
        if _read(path / name) != content:
            good = directory / "restored"
            files.write_durable(good, content)
            replace_names(store, path / name, identity_of(path / name), good)
    store.get(path.name)
    return source


def _surviving_manifest(store: Store, path: Path) -> tuple[bytes, str] | None:
    raw, digest = _read(path / MANIFEST), (_read(path / MANIFEST_DIGEST) or b"").strip()
    if raw and is_digest_damaged(path):
        return raw, "from manifest.json, with which most of the digest agrees"
    for twin in all_snapshots(store):
        theirs = _read(twin.path / MANIFEST)
        if theirs is None or twin.manifest.tag != path.name or twin.path == path:
            continue
        intact = blake3(theirs).hexdigest().encode() == digest or theirs == raw
        if intact or _has_files_of(Snapshot(path, twin.manifest)):
            return theirs, f"from {twin.path}"
    return None


def _has_files_of(snapshot: Snapshot) -> bool:
    """Whether the files in the directory are those of the manifest, the device state above all."""
    try:
        check_sizes(snapshot)
        read_vmstate(snapshot)
    except (RatoonError, OSError):
        return False
    return True


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
