"""The starts that were kept: for each a document, and the snapshot that it points at.

::

    starts/KEY.json      what the start depends on, its snapshot, and the command's pid in there
    starts/.T-XX.lock    held while a start of tier T is made or removed whose key begins with XX

The snapshots are ordinary ones, called `start-` and 24 digits of the key. Either may go at any
time: a document without its snapshot is no start, and a snapshot without a document is litter,
which `prune` removes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from ratoon import files
from ratoon.documents import Document
from ratoon.engine.startup.key import Booted, Difference, Started, differences
from ratoon.errors import Conflict, InvalidInput, NotFound, RatoonError
from ratoon.store.snapshot.manifest import Digest, SnapshotId, Tag
from ratoon.store.snapshot.snapshot import Snapshot
from ratoon.store.snapshot.store import Store
from ratoon.validation import first_error

log = logging.getLogger(__name__)

#: Seconds between two looks at a lock that another process holds.
_POLL = 0.05

TAG = re.compile(r"start-[0-9a-f]{24}")
_DOCUMENT = re.compile(r"[0-9a-f]{64}\.json")

Tier = Literal[1, 2]


class KeptSnapshot(Document):
    tag: Tag
    id: SnapshotId


class Entry(Document):
    """A start that was kept. `image` is what it was asked for by; `pid` is the command's, in there.

    `stages_ms`: how long each stage of its making took.
    """

    format: Literal[1] = 1
    key: Digest
    image: str
    document: Annotated[Booted | Started, Field(discriminator="tier")]
    snapshot: KeptSnapshot
    pid: int | None
    created_at_unix: float
    stages_ms: dict[str, float]

    @property
    def command(self) -> tuple[str, ...]:
        return self.document.argv if isinstance(self.document, Started) else ()


@dataclass(frozen=True)
class Damaged:
    """A document that cannot be used, and why."""

    key: str
    reason: str


def tag_of(key: str) -> str:
    """What the snapshot of the start `key` is called."""
    return f"start-{key[:24]}"


class StartCache:
    """The starts of a store; any number of processes share them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.directory = store.home / "starts"

    # Reading --------------------------------------------------------------------------------------

    def find(self, document: Booted | Started, image: str) -> Entry:
        """The start that was kept for `document`. NotFound says why there is none to be used.

        `image` is what it is asked for by.
        """
        entry = self._read(document.key)
        if entry is None:
            raise NotFound(self._why_none(document, image))
        if isinstance(entry, Damaged):
            raise NotFound(entry.reason)
        if gone := self.gone(entry):
            raise NotFound(gone)
        return entry

    def everything(self) -> list[Entry | Damaged]:
        """All of them, the last made first; those that cannot be used too."""
        try:
            names = sorted(path.name for path in self.directory.iterdir())
        except FileNotFoundError:
            return []
        found = [self._read(name[:64]) for name in names if _DOCUMENT.fullmatch(name)]
        return sorted(
            (each for each in found if each),
            key=lambda each: -each.created_at_unix if isinstance(each, Entry) else 0.0,
        )

    def entries(self) -> list[Entry]:
        return [each for each in self.everything() if isinstance(each, Entry)]

    def named(self, name: str) -> Entry:
        """The one start whose key or tag begins so. NotFound, InvalidInput; Conflict: several."""
        prefix = name.removeprefix("start-")
        if not re.fullmatch(r"[0-9a-f]{1,64}", prefix):
            raise InvalidInput(
                f"{name[:100]!r} is no start: use digits of its key, see `ratoon cache ls`"
            )
        found = [each for each in self.entries() if each.key.startswith(prefix)]
        if not found:
            raise NotFound(f"no start {name}; `ratoon cache ls` lists those there are")
        if len(found) > 1:
            keys = ", ".join(each.key[:24] for each in found)
            raise Conflict(f"several starts begin with {prefix}: {keys}; use more digits")
        return found[0]

    def nearest(
        self, document: Booted | Started, image: str | None = None
    ) -> tuple[Entry, tuple[Difference, ...]] | None:
        """Of the other starts of this tier the one with the fewest differences, and those.

        `image`: only of those that were asked for by this name, or are of the same image.
        """
        others = [
            (each, differences(each.document, document))
            for each in self.entries()
            if each.document.tier == document.tier
            and each.key != document.key
            and (image in (None, each.image) or _image_of(each.document) == _image_of(document))
        ]
        return min(others, key=lambda found: len(found[1]), default=None)

    def gone(self, entry: Entry) -> str | None:
        """Why the start's snapshot cannot be had any more, if that is so."""
        tag = entry.snapshot.tag
        try:
            snapshot = self._store.get(tag)
        except RatoonError as error:
            return f"its snapshot {tag} is gone" if isinstance(error, NotFound) else str(error)
        if snapshot.manifest.id != entry.snapshot.id:
            return f"its snapshot {tag} is gone, and another one has its name"
        return None

    def used_at(self, key: str) -> float:
        """When it was last used, in seconds since 1970; 0 if it is gone."""
        with suppress(FileNotFoundError):
            return self._path(key).stat().st_mtime
        return 0.0

    def orphans(self) -> Iterator[str]:
        """The tags of snapshots that no document points at."""
        pointed = {each.snapshot.tag for each in self.entries()}
        for path in sorted(self._store.snapshots.iterdir()):
            if TAG.fullmatch(path.name) and path.name not in pointed:
                yield path.name

    # Writing --------------------------------------------------------------------------------------

    def touch(self, entry: Entry) -> None:
        """Note that it was used now."""
        with suppress(FileNotFoundError):
            os.utime(self._path(entry.key))

    def write(
        self,
        document: Booted | Started,
        snapshot: Snapshot,
        *,
        image: str,
        pid: int | None,
        stages_ms: dict[str, float],
    ) -> Entry:
        """Keep a start whose snapshot has been published; it is found from now on."""
        entry = Entry(
            key=document.key,
            image=image,
            document=document,
            snapshot=KeptSnapshot(tag=snapshot.manifest.tag, id=snapshot.manifest.id),
            pid=pid,
            created_at_unix=time.time(),
            stages_ms=stages_ms,
        )
        self.directory.mkdir(mode=0o700, exist_ok=True)
        entry.save(self._path(entry.key))
        return entry

    def remove(self, key: str) -> None:
        """Forget a start; its snapshot stays."""
        self._path(key).unlink(missing_ok=True)

    @asynccontextmanager
    async def making(self, tier: Tier, key: str) -> AsyncIterator[None]:
        """Nobody else, in whatever process, makes or removes the start meanwhile; waits for that.

        Who holds one of tier 2 may ask for one of tier 1, and not the other way round.
        """
        while (lock := self.try_making(tier, key)) is None:
            await asyncio.sleep(_POLL)
        try:
            yield
        finally:
            os.close(lock)

    def try_making(self, tier: Tier, key: str) -> int | None:
        """The descriptor that holds the same as `making`, or None if somebody else does."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        return files.try_lock(self.directory / f".{tier}-{key[:2]}.lock")

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.json"

    def _read(self, key: str) -> Entry | Damaged | None:
        try:
            entry = Entry.load(self._path(key))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            return Damaged(key, f"its document is damaged: {first_error(error)}")
        if not entry.key == entry.document.key == key:
            return Damaged(key, "its document is damaged: it is not what its key says")
        return entry

    def _why_none(self, document: Booted | Started, image: str) -> str:
        near = self.nearest(document, image)
        if near is None:
            return "nothing of this image was kept"
        entry, found = near
        shown = "; ".join(str(each) for each in found[:3])
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        return f"the nearest, {entry.key[:12]}, differs: {shown}{more}"


def _image_of(document: Booted | Started) -> str:
    """The digest of the image that it is a start of."""
    return document.image if isinstance(document, Booted) else document.booted.image
