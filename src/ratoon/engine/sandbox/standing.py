"""What a sandbox stands on, and its origin: what a reset takes it back to.

It stands on what its memory and disk are a difference to: a snapshot, or itself as it was at a
standby, or when it was forked. Its origin is its last branch, else what it was forked from; so the
two differ only while it stands on itself.
"""

from __future__ import annotations

import logging

from ratoon.engine.sandbox.directory import ORIGIN, PARENT
from ratoon.engine.sandbox.incarnation import Incarnation
from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import Conflict, RatoonError
from ratoon.store.snapshot.snapshot import Snapshot

log = logging.getLogger(__name__)


def stand_on(sandbox: Sandbox, run: Incarnation, snapshot: Snapshot) -> None:
    """It was branched: it stands on `snapshot`, and that is its origin."""
    run.frozen = None
    sandbox.parent = sandbox.origin = snapshot
    try:
        sandbox.parent = sandbox.origin = sandbox.directory.stand_on(snapshot)
    except OSError as error:
        log.warning(
            "sandbox %s cannot link the layers of %s (%s): do not delete that snapshot "
            "before the sandbox",
            *(sandbox.id, snapshot.manifest.tag, error.strerror),
        )


def stand_on_itself(sandbox: Sandbox, snapshot: Snapshot) -> None:
    """It stands on its own state, published from its directory; its origin stays. OSError."""
    before = sandbox.parent
    sandbox.parent = sandbox.directory.stand_on_itself(snapshot, before)
    if sandbox.origin is before:
        sandbox.origin = Snapshot(sandbox.directory.path / ORIGIN, before.manifest)


def origin_of(sandbox: Sandbox) -> Snapshot:
    """What a reset takes it back to. Conflict: nobody has that any more."""
    if sandbox.origin is None:
        raise Conflict(
            f"sandbox {sandbox.id} cannot be reset: snapshot {sandbox.snapshot_tag} is gone, and "
            "the older Ratoon that had the sandbox before kept no copy of it; branch the sandbox, "
            "and a reset goes back to that"
        )
    return sandbox.origin


def go_back(sandbox: Sandbox) -> None:
    """It was reset: its directory has it stand on its origin, as its machine does."""
    assert sandbox.origin is not None
    sandbox.parent = sandbox.origin
    try:
        settle(sandbox)
    except (OSError, RatoonError) as error:  # it is written down that its machine does
        log.warning("the directory of sandbox %s is behind: %s", sandbox.id, error)


def settle(sandbox: Sandbox) -> None:
    """Have its directory tell what it stands on, if that could not be done before. OSError."""
    parent, directory = sandbox.parent, sandbox.directory
    if parent.path == directory.path / ORIGIN:
        sandbox.parent = sandbox.origin = directory.go_back(parent)
    elif parent.path != directory.path / PARENT:
        sandbox.parent = sandbox.origin = directory.stand_on(parent)
