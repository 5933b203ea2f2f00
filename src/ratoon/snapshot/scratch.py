"""A place in the store for what nobody needs afterwards: held while in use, removed on every path.

It lies in staging, on the file system of the snapshots, so their files can be linked into it; one
that a crash left behind goes with the other leftovers when the store is opened next.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ratoon import files
from ratoon.snapshot.store import Store


@contextmanager
def scratch(store: Store) -> Iterator[Path]:
    """A new, empty directory of mode 0700, gone with all its content on leaving."""
    path = store.staging / f".scratch-{secrets.token_hex(8)}"  # no tag begins with a dot
    with files.locked(store.lock):
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
