"""What a check of the store found, as data: what is wrong, where, how bad, and the way out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ratoon.errors import Corrupt, RatoonError
from ratoon.store.snapshot.store_format import FORMAT


class Severity(Enum):
    """How much a finding matters."""

    #: Something that a snapshot consists of is lost or wrong.
    DAMAGE = "damage"
    #: Nothing is lost: litter, a cache that can be made again, a mode.
    MINOR = "minor"
    #: Worth knowing; the store is sound.
    NOTE = "note"


class Kind(Enum):
    """The class of a finding."""

    STORE = "damaged store"
    SNAPSHOT = "damaged snapshot"
    MANIFEST = "damaged manifest"
    MEMORY = "damaged layer"
    DISK = "damaged disk"
    VMSTATE = "damaged vmstate"
    IMAGE = "damaged image"
    TEMPLATE = "damaged template"
    LITTER = "litter"
    ORPHAN = "orphan"
    MODE = "wrong mode"
    PARENT_GONE = "parent gone"
    OUTDATED = "outdated snapshot"
    UNUSED_IMAGE = "unused image"

    @property
    def severity(self) -> Severity:
        return _SEVERITIES.get(self, Severity.DAMAGE)


_SEVERITIES = {
    Kind.IMAGE: Severity.MINOR,
    Kind.TEMPLATE: Severity.MINOR,
    Kind.LITTER: Severity.MINOR,
    Kind.ORPHAN: Severity.MINOR,
    Kind.MODE: Severity.MINOR,
    Kind.PARENT_GONE: Severity.NOTE,
    Kind.OUTDATED: Severity.NOTE,
    Kind.UNUSED_IMAGE: Severity.NOTE,
}

_REPAIR = "run `ratoon check --repair`"
_REMAKE = f"{_REPAIR}, which re-makes it if a copy or an image has its content; "
_WAYS_OUT = {
    Kind.STORE: f'if this Ratoon made all that is in it, write {{"format": {FORMAT}}} to it',
    Kind.SNAPSHOT: "delete the snapshot and make it anew; what was made from it stays whole",
    Kind.MANIFEST: f"{_REPAIR}, which restores it from a copy; else delete the snapshot",
    Kind.MEMORY: _REMAKE + "else delete the snapshots that have the layer",
    Kind.DISK: _REMAKE + "else delete the snapshots that have the layer",
    Kind.VMSTATE: _REMAKE + "else delete the snapshot; what was made from it stays whole",
    Kind.IMAGE: f"{_REPAIR}, which removes it; the next fork makes it again",
    Kind.TEMPLATE: f"{_REPAIR}, which removes it; the next fork makes it again",
    Kind.LITTER: f"{_REPAIR}, which removes it",
    Kind.ORPHAN: "Ratoon did not make it: move it elsewhere, or delete it",
    Kind.MODE: f"{_REPAIR}, which sets the mode",
    Kind.PARENT_GONE: "nothing to do: the snapshot has all that it needs",
    Kind.OUTDATED: "build it anew; until it is deleted, what it stores can still be read",
    Kind.UNUSED_IMAGE: "nothing to do: it is a cache, and may be deleted",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    `snapshot` is the tag of the snapshot that it is part of; for a layer, of the one that added it.
    `page` is a page number in the guest's RAM.
    """

    kind: Kind
    snapshot: str | None
    file: Path
    what: str
    way_out: str
    page: int | None = None

    @classmethod
    def of(
        cls,
        kind: Kind,
        file: Path,
        what: str,
        *,
        snapshot: str | None = None,
        page: int | None = None,
    ) -> Finding:
        """A finding with the way out that its kind has."""
        return cls(kind, snapshot, file, what, _WAYS_OUT[kind], page)

    @property
    def severity(self) -> Severity:
        return self.kind.severity


@dataclass(frozen=True)
class Report:
    """What a check came to.

    `snapshots` and `images` are how many there are, `bytes_read` how many bytes of data were
    compared with their digests, `in_use` what other processes hold, and so is not judged.
    """

    findings: tuple[Finding, ...] = ()
    snapshots: int = 0
    images: int = 0
    bytes_read: int = 0
    in_use: tuple[Path, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether there is nothing but notes."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """5: a snapshot is damaged; 1: litter or a damaged cache, nothing worse; 0: sound."""
        found = {finding.severity for finding in self.findings}
        if Severity.DAMAGE in found:
            return Corrupt.exit_code
        return RatoonError.exit_code if Severity.MINOR in found else 0


def unreadable(error: OSError) -> str:
    """What to say of a file that the host cannot read."""
    return f"cannot be read: {error.strerror or error}"
