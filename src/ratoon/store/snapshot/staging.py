"""Publishing: a snapshot is built aside, and appears under its tag whole, or not at all.

A staging directory is held by the `flock` on itself, for as long as somebody works in it. One that
nobody holds is what a crash left behind.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from contextlib import ExitStack, suppress
from pathlib import Path

from blake3 import blake3

from ratoon import files, syscalls
from ratoon.errors import AlreadyExists, HostError, InFlight
from ratoon.files import Stamp
from ratoon.store.snapshot.manifest import Manifest, encode
from ratoon.store.snapshot.snapshot import (
    ANCESTRY,
    DISK,
    MANIFEST,
    MANIFEST_DIGEST,
    VERIFIED,
    Snapshot,
    link_layer,
)
from ratoon.store.snapshot.verify import Stamps, check_sizes, dump_stamps, read_stamps

#: The kernel's and the file system's ways to say that they cannot exchange.
_NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class Staging:
    """A snapshot in the making: `path` takes its files, `publish` makes it one.

    Comes from `Store.stage`, which holds the directory and removes what was not published.
    """

    def __init__(self, path: Path, tag: str, target: Path) -> None:
        self.path = path
        self.tag = tag
        #: Set once the directory has its final name.
        self.published = False
        self.target = target

    def adopt_ancestry(self, parent: Snapshot, layers: int | None = None) -> None:
        """Hard-link the layers of `parent`, in the store or a sandbox's twin, below this one.

        All of them, or the lowest `layers`. What `parent` knows to be verified stays so. Corrupt:
        a file of `parent` is missing. NotFound: it was deleted meanwhile.
        """
        known = read_stamps(parent.path)
        stamps: Stamps = {}
        (self.path / ANCESTRY).mkdir(mode=0o700)
        for layer in range(parent.depth + 1 if layers is None else layers):
            link_layer(parent, layer, self.path / ANCESTRY / str(layer))
            if stamp := known.get(str(parent.disk_path(layer).relative_to(parent.path))):
                stamps[f"{ANCESTRY}/{layer}/{DISK}"] = stamp
        (self.path / VERIFIED).write_bytes(dump_stamps(stamps))

    def publish(self, manifest: Manifest) -> Snapshot:
        """Make the staged files the snapshot `manifest`; once this returns, power loss is no harm.

        The files must be there, with the sizes that the manifest says (else Corrupt), and be what
        its digests say: what was just written is not read again. AlreadyExists: the tag was taken
        meanwhile. A failure leaves no such snapshot, unless it is the last fsync that fails.
        """
        self._seal(manifest)
        return self._appear(manifest)

    def replace(self, manifest: Manifest, store_lock: Path) -> Snapshot:
        """As `publish`, but in the place of the snapshot that has the tag, if there is one.

        The one goes when the other appears: at no instant is there none, or half of one. InFlight:
        the other is being published. HostError: the file system cannot do this.
        """
        self._seal(manifest)
        doomed = self.path.with_name(f".deleted-{self.tag}-{secrets.token_hex(4)}")
        with ExitStack() as held:
            with files.locked(store_lock):
                try:
                    lock = files.try_lock_directory(self.target)
                except FileNotFoundError:
                    return self._appear(manifest)
                if lock is None:
                    raise InFlight(f"snapshot {self.tag} is being published; try again")
                held.callback(os.close, lock)
                exchange(self.path, self.target)
                self.published = True
                self.path.rename(doomed)  # nobody who claims the tag may meet it
            files.fsync_path(self.target.parent)
            files.fsync_path(self.path.parent)
            shutil.rmtree(doomed)
        return Snapshot(self.target, manifest)

    def _seal(self, manifest: Manifest) -> None:
        """Write what makes the staged files a snapshot, and flush all of it to the disk."""
        if manifest.tag != self.tag:
            raise ValueError(f"a manifest for {manifest.tag} in the staging of {self.tag}")
        check_sizes(Snapshot(self.path, manifest))
        raw = encode(manifest)
        stamps = read_stamps(self.path)
        stamps[DISK] = Stamp.of(self.path / DISK, with_ctime=False)
        (self.path / MANIFEST).write_bytes(raw)
        (self.path / MANIFEST_DIGEST).write_bytes(blake3(raw).hexdigest().encode() + b"\n")
        (self.path / VERIFIED).write_bytes(dump_stamps(stamps))
        _fsync_new(self.path)

    def _appear(self, manifest: Manifest) -> Snapshot:
        """Give the sealed directory its final name, for good."""
        if os.path.lexists(self.target):  # a rename would replace an empty directory
            raise already_exists(self.tag)
        try:
            self.path.rename(self.target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise already_exists(self.tag) from error
        self.published = True
        files.fsync_path(self.target.parent)
        files.fsync_path(self.path.parent)
        return Snapshot(self.target, manifest)


def remove_unheld(directory: Path) -> bool:
    """Remove a directory that nobody holds; False if somebody does.

    The caller must hold the store's lock, so that nobody makes another of that name meanwhile.
    """
    try:
        lock = files.try_lock_directory(directory)
    except FileNotFoundError:
        return True
    if lock is None:
        return False
    try:
        with suppress(FileNotFoundError):  # its holder renamed it before letting go
            shutil.rmtree(directory)
    finally:
        os.close(lock)
    return True


def exchange(first: Path, second: Path) -> None:
    """Swap what the two paths name, on one file system; no instant sees one of them missing.

    HostError: the file system cannot (ext4, xfs, btrfs and tmpfs can). Is durable once both
    parent directories are flushed.
    """
    try:
        syscalls.exchange(first, second)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        raise HostError(
            f"the file system cannot replace {second} at once; delete it first"
        ) from None


def already_exists(tag: str) -> AlreadyExists:
    return AlreadyExists(f"snapshot {tag} exists already; delete it first or choose another tag")


def _fsync_new(root: Path) -> None:
    """Flush all directories, and all files but the layers below that have another link.

    Those are durable already. An fsync of each would cost a flush of the disk's cache, though
    nothing is left to write, and so make publishing slower with every layer below.
    """
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if directory == str(root) or path.stat().st_nlink == 1:
                files.fsync_path(path)
        files.fsync_path(Path(directory))
