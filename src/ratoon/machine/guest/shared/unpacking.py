"""A tar stream into a file or a tree.

On the host, what arrives was written by a guest that is not trusted. Nothing is made outside of the
destination, whatever the archive says: names lead down from its root through real directories,
opened one from the other, and links are made but never followed. With `Bounds` nothing stays behind
either that could do harm later: no setuid, no link that leads out of the tree; and there is an end.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from . import tar
from .directories import Cursor, remove_tree
from .new_file import NewFile, temporary_name, unlink_if_there
from .packing import LeftOut

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator


class Bounds:
    """What a tree may come to whose maker is not trusted."""

    def __init__(self, size_bytes: int, entries: int) -> None:
        self.size_bytes = size_bytes
        self.entries = entries


class Unpacker:
    """Unpacks to `path`: `feed` it, then `finish`; `close` it whatever happens.

    A new tree is made beside its place and moved there when it is whole, and so is each file; what
    was not finished leaves nothing, once `close` has run to its end. With `merge`, a directory that
    is there already takes what is new; what else is in it stays, and so do its permissions.
    """

    def __init__(
        self,
        path: bytes,
        *,
        merge: bool,
        owners: bool,
        owner: tuple[int, int] | None = None,
        into: bool = False,
        bounds: Bounds | None = None,
    ) -> None:
        """`owners`: give everything the owner that the archive names; else it is that `owner`'s,
        or the caller's.

        `into`: `path` is a directory for whatever the archive holds, of anybody's making, where
        not every directory needs an entry. Else the archive is a Packer's, and has one root.
        """
        self._path = path
        self._into = into
        self._merge = merge
        self._owners = owners
        self._one_owner = owner
        self._bounds = bounds
        self._reader = tar.Reader()
        #: The directory in which the root is to appear, and what it is called there until then.
        self._above: int | None = None
        self._staging: bytes | None = None
        #: Where things are made. None if the root is a file.
        self._cursor: Cursor | None = None
        self._root: int | None = None
        #: The entries of the directories that the cursor is in; None for one that was there before.
        self._within: list[tar.Entry | None] = []
        self._entry = tar.Entry(b"", b"")
        self._file: NewFile | None = None
        self._file_left = 0
        self.entries = 0
        self.size_bytes = 0
        self.left_out = LeftOut()

    def feed(self, data: bytes) -> Generator[None, None, None]:
        """Take the next piece of the archive; pauses between entries. Raises TarError, OSError."""
        for part in self._reader.feed(data):
            try:
                if isinstance(part, tar.Entry):
                    self._entry = part
                    self._begin(part)
                elif self._file is not None:
                    self._file.write(part)
                    self._file_left -= len(part)
                if self._file is not None and not self._file_left and self._cursor is not None:
                    self._end_file()
            except OSError as error:
                first = self.entries == 1
                error.filename = self._path if first else os.path.join(self._path, self._entry.name)
                error.filename2 = None
                raise
            if isinstance(part, tar.Entry):
                yield

    def finish(self) -> None:
        """All has been fed: put it in its place. Raises TarError where the archive has no end."""
        if not self._reader.ended or not self.entries:
            raise tar.TarError("it ends too early")
        if self._cursor is None:
            self._end_file()
            return
        self._go_to([])
        (root,) = self._within
        if root is not None:
            self._set_attributes(self._cursor.fd, root)
        if self._staging is not None:
            name = os.path.basename(self._path.rstrip(b"/"))
            os.rename(self._staging, name, src_dir_fd=self._above, dst_dir_fd=self._above)
            self._staging = None

    def close(self) -> Generator[None, None, None]:
        """Let go of everything. What was not finished is removed, with pauses."""
        if self._file is not None:
            self._file.discard()
        if self._cursor is not None:
            self._cursor.close()
        if self._root is not None:
            os.close(self._root)
        if self._above is not None:
            try:
                if self._staging is not None:
                    yield from remove_tree(self._staging, self._above)
            finally:
                os.close(self._above)

    # Entries --------------------------------------------------------------------------------------

    def _begin(self, entry: tar.Entry) -> None:
        self.entries += 1
        self.size_bytes += entry.size
        if self._bounds is not None:
            if self.size_bytes > self._bounds.size_bytes:
                raise tar.TarError(f"it has more than {self._bounds.size_bytes} bytes")
            if self.entries > self._bounds.entries:
                raise tar.TarError(f"it has more than {self._bounds.entries} entries")
        parts = _parts(entry.name)
        if self.entries == 1:
            if self._into and parts:
                now = time.time_ns()
                self._begin_directory(tar.Entry(b".", tar.DIRECTORY, mode=0o755, mtime_ns=now))
            elif entry.kind == tar.DIRECTORY and not parts:
                self._begin_directory(entry)
                return
            elif entry.kind == tar.FILE and not self._into:
                check_replaceable(self._path)
                above, name = os.path.split(self._path.rstrip(b"/"))
                self._above = _open_directory(above)
                self._begin_file(self._above, name, entry)
                return
        if self._cursor is None or not parts:
            raise tar.TarError("it has not one root")
        self._go_to(parts[:-1])
        name = parts[-1]
        if entry.kind == tar.DIRECTORY:
            self._make_directory(name, entry)
        elif entry.kind == tar.FILE:
            self._begin_file(self._cursor.fd, name, entry)
        elif entry.kind == tar.SYMLINK:
            self._make_symlink(name, entry)
        else:
            self._make_hard_link(name, entry)

    def _begin_directory(self, entry: tar.Entry) -> None:
        """The root is a directory."""
        try:
            self._root = _open_directory(self._path)
        except FileNotFoundError:
            self._above = _open_directory(os.path.dirname(self._path.rstrip(b"/")))
            staging = temporary_name()
            os.mkdir(staging, 0o700, dir_fd=self._above)
            self._staging = staging
            self._root = os.open(staging, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._above)
            self._within.append(entry)
        else:
            if not self._merge:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            self._within.append(None)
        self._cursor = Cursor(os.dup(self._root))

    def _go_to(self, parts: list[bytes]) -> None:
        """Move the cursor. Directories that are left get their attributes, now that all is made."""
        cursor = self._cursor
        assert cursor is not None
        while cursor.names != parts[: len(cursor.names)]:
            left = cursor.leave()
            try:
                entry = self._within.pop()
                if entry is not None:
                    self._set_attributes(left, entry)
            finally:
                os.close(left)
        for name in parts[len(cursor.names) :]:
            try:
                cursor.enter(name)
            except FileNotFoundError:
                if not self._into:
                    raise
                os.mkdir(name, 0o755, dir_fd=cursor.fd)
                self._give(name, cursor.fd, self._one_owner)
                cursor.enter(name)
            self._within.append(None)

    def _make_directory(self, name: bytes, entry: tar.Entry) -> None:
        assert self._cursor is not None
        made = True
        try:
            os.mkdir(name, 0o700, dir_fd=self._cursor.fd)
        except FileExistsError:
            made = False
        self._cursor.enter(name)
        self._within.append(entry if made else None)

    def _begin_file(self, directory: int, name: bytes, entry: tar.Entry) -> None:
        self._file = NewFile(directory, name)
        self._file_left = entry.size

    def _end_file(self) -> None:
        file, self._file = self._file, None
        assert file is not None
        file.publish(self._mode(self._entry), self._owner(self._entry), self._entry.mtime_ns)

    def _make_symlink(self, name: bytes, entry: tar.Entry) -> None:
        assert self._cursor is not None
        if self._bounds is not None and leads_out(entry.target, len(self._cursor.names)):
            target = entry.target.decode("utf-8", "backslashreplace")
            self.left_out.add(entry.name, f"a link out of the tree, to {target}")
            return
        directory = self._cursor.fd
        temporary = temporary_name()
        os.symlink(entry.target, temporary, dir_fd=directory)
        try:
            self._give(temporary, directory, self._owner(entry))
            times = entry.mtime_ns, entry.mtime_ns
            os.utime(temporary, ns=times, dir_fd=directory, follow_symlinks=False)
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            os.unlink(temporary, dir_fd=directory)
            raise

    def _make_hard_link(self, name: bytes, entry: tar.Entry) -> None:
        assert self._cursor is not None
        assert self._root is not None
        *way, target = _parts(entry.target) or [b"."]
        there = Cursor(os.dup(self._root))
        temporary = temporary_name()
        try:
            for directory in way:
                there.enter(directory)
            status = os.stat(target, dir_fd=there.fd, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise tar.TarError("a hard link to what is no file")
            here = self._cursor.fd
            os.link(target, temporary, src_dir_fd=there.fd, dst_dir_fd=here, follow_symlinks=False)
            try:
                os.rename(temporary, name, src_dir_fd=here, dst_dir_fd=here)
            finally:
                # Still there if it failed, and if `name` was the same file already.
                unlink_if_there(temporary, here)
        finally:
            there.close()

    def _set_attributes(self, fd: int, entry: tar.Entry) -> None:
        owner = self._owner(entry)
        if owner is not None:
            os.fchown(fd, *owner)
        os.fchmod(fd, self._mode(entry))
        os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))

    def _mode(self, entry: tar.Entry) -> int:
        return entry.mode & (0o7777 if self._bounds is None else 0o777)

    def _owner(self, entry: tar.Entry) -> tuple[int, int] | None:
        return (entry.uid, entry.gid) if self._owners else self._one_owner

    def _give(self, name: bytes, directory: int, owner: tuple[int, int] | None) -> None:
        if owner is not None:
            os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)


def check_replaceable(path: bytes) -> None:
    """Raise OSError where `path` is something that a file must not take the place of."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "it is there, and no regular file", path)


def leads_out(target: bytes, depth: int) -> bool:
    """Whether a link `depth` directories below the root may lead out of the tree.

    Ways up are counted at its beginning, where the directories are real. Later ones might go up
    from wherever another link has led to.
    """
    parts = [part for part in target.split(b"/") if part not in (b"", b".")]
    up = 0
    while up < len(parts) and parts[up] == b"..":
        up += 1
    return target.startswith(b"/") or up > depth or b".." in parts[up:]


def _parts(name: bytes) -> list[bytes]:
    """The names that lead from the root to an entry."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if name.startswith(b"/") or b".." in parts:
        raise tar.TarError(f"the name {name[:200]!r} leads out of it")
    return parts


def _open_directory(path: bytes) -> int:
    return os.open(path or b"/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
