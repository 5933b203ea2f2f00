"""What happens in a directory, through inotify: a line of JSON for each event."""

from __future__ import annotations

import errno
import json
import os

from . import libc
from .files import FileStream, text
from .stream import Refusal, operation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

    from .loop import Timer
    from .stream import Request

_MASK = (
    libc.IN_CREATE | libc.IN_DELETE | libc.IN_MODIFY | libc.IN_MOVED_FROM | libc.IN_MOVED_TO
) | (libc.IN_ONLYDIR | libc.IN_EXCL_UNLINK)
_ROOT_MASK = _MASK | libc.IN_DELETE_SELF | libc.IN_MOVE_SELF
_ROOT_GONE = libc.IN_DELETE_SELF | libc.IN_MOVE_SELF | libc.IN_IGNORED
_READ = 4096
#: Seconds to wait for the second half of a rename. The kernel says both at once, one by one.
_PATIENCE = 0.05


class Directory:
    """One that is watched; who is above it may change, its watch does not."""

    __slots__ = ("above", "below", "met", "name", "watch")

    def __init__(self, watch: int, name: bytes, above: Directory | None) -> None:
        self.watch = watch
        self.name = name
        self.above = above
        self.below: dict[bytes, Directory] = {}
        #: What was met in it while it was being looked through: its events may be still to come.
        self.met: set[bytes] = set()

    def path(self, name: bytes) -> bytes:
        parts = [name]
        directory: Directory | None = self
        while directory is not None:
            parts.append(directory.name)
            directory = directory.above
        return os.path.join(*reversed(parts))


@operation("files.watch")
class Watch(FileStream):
    """Runs until the host cancels it, or the directory is gone.

    It says STARTED once everything is watched that is there. With `recursive`, what is below too,
    on the same file system; what a new directory holds by then is reported as created.
    """

    _fd: int | None = None
    _listening = False
    _timer: Timer | None = None

    def start(self, request: Request) -> None:
        path = self.named(request)
        self._recursive = request["recursive"]
        self._device = os.stat(path).st_dev
        self._fd = libc.inotify_init()
        self._directories: dict[int, Directory] = {}
        #: The first half of a rename: directory, name, cookie, and whether it is a directory.
        self._moved: tuple[Directory, bytes, int, bool] | None = None
        #: Of what the last event told that something was written, so that once is enough.
        self._modified: tuple[Directory, bytes] | None = None
        self._looked_through: list[Directory] = []
        self._said = bytearray()
        root = self._add(None, path)
        assert root is not None
        self._root = root
        self.work(self._begin())

    def on_end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._fd is not None:
            self._listen(False)
            os.close(self._fd)

    # When to listen -------------------------------------------------------------------------------

    def _begin(self) -> Generator[None, None, None]:
        if self._recursive:
            yield from self._look_through(self._root, silent=True)
        self.started()
        self._listen(True)

    def _listen(self, on: bool) -> None:
        assert self._fd is not None
        if on and not self._listening:
            self.agent.watch(self._fd, self._ready)
        elif self._listening and not on:
            self.agent.unwatch(self._fd)
        self._listening = on

    def _ready(self) -> None:
        """There are events. No more are read until these are dealt with and sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._listen(False)
        self.work(self._drain())

    def _too_late(self) -> None:
        """The second half of a rename does not come: it has left what is watched."""
        self._timer = None
        self._settle()
        self._listen(False)
        self.work(self._drain())

    def _drain(self) -> Generator[None, None, None]:
        assert self._fd is not None
        while True:
            try:
                data = os.read(self._fd, _READ)
            except BlockingIOError:
                break
            for watch, mask, cookie, name in libc.inotify_events(data):
                yield from self._hear(watch, mask, cookie, name)
                if self.ended:
                    return
            yield from self._flush()
            yield
        # Whatever was met in a directory has had its event by now.
        for directory in self._looked_through:
            directory.met.clear()
        self._looked_through.clear()
        self._modified = None
        yield from self._flush()
        if self._moved is not None:
            self._timer = self.agent.after(_PATIENCE, self._too_late)
        self._listen(True)

    # What happened --------------------------------------------------------------------------------

    def _hear(self, watch: int, mask: int, cookie: int, name: bytes) -> Generator[None, None, None]:
        if mask & libc.IN_Q_OVERFLOW:
            yield from self._recover()
            return
        directory = self._directories.get(watch)
        if directory is None:
            return
        if directory is self._root and mask & _ROOT_GONE:
            self._settle()
            self._say("removed", self.path, is_directory=True)
            yield from self._flush()
            self.reply()
            return
        if mask & libc.IN_IGNORED:
            self._forget(directory)
            return
        is_directory = bool(mask & libc.IN_ISDIR)
        moved, came = self._moved, mask & (libc.IN_CREATE | libc.IN_MOVED_TO)
        if moved is not None and mask & libc.IN_MOVED_TO and moved[2] == cookie:
            self._moved = None
            yield from self._renamed(moved[0], moved[1], directory, name, is_directory)
            return
        self._settle()
        if mask & libc.IN_MODIFY:
            if self._modified != (directory, name):
                self._say("modified", directory.path(name), is_directory=is_directory)
            self._modified = directory, name
            return
        self._modified = None
        met = name in directory.met
        directory.met.discard(name)
        if came and not met:
            self._say("created", directory.path(name), is_directory=is_directory)
            if is_directory:
                yield from self._adopt(directory, name)
        elif mask & libc.IN_DELETE:
            self._say("removed", directory.path(name), is_directory=is_directory)
        elif mask & libc.IN_MOVED_FROM:
            self._moved = directory, name, cookie, is_directory

    def _settle(self) -> None:
        """What began as a rename and is none: it has left what is watched."""
        if self._moved is None:
            return
        directory, name, _, is_directory = self._moved
        self._moved = None
        self._say("removed", directory.path(name), is_directory=is_directory)
        gone = directory.below.pop(name, None)
        to_forget = [gone] if gone is not None else []
        while to_forget:
            directory = to_forget.pop()
            to_forget += directory.below.values()
            self._directories.pop(directory.watch, None)
            self._unwatch(directory.watch)

    def _renamed(
        self, source: Directory, old: bytes, target: Directory, new: bytes, is_directory: bool
    ) -> Generator[None, None, None]:
        path = source.path(old)
        moved = source.below.pop(old, None)
        self._say("renamed", target.path(new), is_directory=is_directory, old_path=path)
        if moved is not None:
            moved.name, moved.above = new, target
            target.below[new] = moved
        elif is_directory and new not in target.below:
            yield from self._adopt(target, new)

    def _recover(self) -> Generator[None, None, None]:
        """Events were lost. Say so, and find out anew which directories there are."""
        self._settle()
        self._say("overflow", self.path, is_directory=True)
        if not self._recursive:
            return
        before = self._directories
        self._directories = {self._root.watch: self._root}
        self._root.below = {}
        yield from self._look_through(self._root, silent=True)
        for watch in before.keys() - self._directories.keys():
            self._unwatch(watch)

    # What is watched ------------------------------------------------------------------------------

    def _add(self, above: Directory | None, name: bytes) -> Directory | None:
        """Watch a directory; None if that would go round in circles (there are bind mounts)."""
        assert self._fd is not None
        path = name if above is None else above.path(name)
        mask = _ROOT_MASK if above is None else _MASK | libc.IN_DONT_FOLLOW
        try:
            watch = libc.inotify_add(self._fd, path, mask)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise Refusal(
                f"{text(path)}: no more directories can be watched; "
                "raise /proc/sys/fs/inotify/max_user_watches in the guest",
                "too-many-watches",
            ) from None
        known = self._directories.get(watch)
        if known is None:
            known = self._directories[watch] = Directory(watch, name, above)
        else:
            higher = above
            while higher is not None:
                if higher is known:
                    return None
                higher = higher.above
            if known.above is not None and known.above.below.get(known.name) is known:
                del known.above.below[known.name]
            known.name, known.above = name, above
        if above is not None:
            above.below[name] = known
        return known

    def _adopt(self, above: Directory, name: bytes) -> Generator[None, None, None]:
        """A directory has come: watch it, and report what is in it already."""
        if not self._recursive:
            return
        try:
            directory = self._add(above, name)
        except (FileNotFoundError, NotADirectoryError):
            return  # it is gone again
        if directory is not None:
            yield from self._look_through(directory, silent=False)

    def _look_through(self, directory: Directory, *, silent: bool) -> Generator[None, None, None]:
        """Watch what is below, too; unless `silent`, report it as created."""
        to_do = [directory]
        while to_do:
            directory = to_do.pop()
            self._looked_through.append(directory)
            try:
                entries = list(os.scandir(directory.path(b"")))
            except (FileNotFoundError, NotADirectoryError):
                continue
            for entry in entries:
                is_directory = entry.is_dir(follow_symlinks=False)
                if not silent:
                    directory.met.add(entry.name)
                    path = directory.path(entry.name)
                    self._say("created", path, is_directory=is_directory)
                if is_directory:
                    try:
                        if entry.stat(follow_symlinks=False).st_dev != self._device:
                            continue
                        below = self._add(directory, entry.name)
                    except (FileNotFoundError, NotADirectoryError):
                        continue
                    if below is not None:
                        to_do.append(below)
            yield from self._flush()
            yield

    def _forget(self, directory: Directory) -> None:
        """It is gone, and with it its watch."""
        del self._directories[directory.watch]
        above = directory.above
        if above is not None and above.below.get(directory.name) is directory:
            del above.below[directory.name]

    def _unwatch(self, watch: int) -> None:
        assert self._fd is not None
        libc.inotify_remove(self._fd, watch)

    # Saying so ------------------------------------------------------------------------------------

    def _say(
        self, event: str, path: bytes, *, is_directory: bool, old_path: bytes | None = None
    ) -> None:
        line = {"event": event, "path": text(path), "is_directory": is_directory}
        if old_path is not None:
            line["old_path"] = text(old_path)
        self._said += json.dumps(line).encode() + b"\n"

    def _flush(self) -> Generator[None, None, None]:
        said = bytes(self._said)
        self._said.clear()
        yield from self.say(said)
