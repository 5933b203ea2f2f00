"""The root directory of a cell: copies of programs, what they link to, and some files of theirs.

Copies, for a program that runs keeps to the version that it was started with, while its package is
upgraded, and nothing else of the host is in there to be looked at.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from ratoon.artifacts import build_once, require_exec, run
from ratoon.errors import HostError

#: Rewritten whenever a library is installed, and so it stands for all of those (ldconfig(8)).
_LINKER_CACHE = Path("/etc/ld.so.cache")
#: Where their libraries lie, all in one directory: the linker need not search.
LIBRARIES = "/lib"
#: What a program is started by that is to die with the thread it is from: no fork, but an exec.
DYING_WITH_PARENT = ("/usr/bin/setpriv", "--pdeathsig", "KILL", "--")
#: Empty, for something to be mounted on.
NULL = "dev/null"
_ROOT = "root"
#: A library of a program and where it was found, as ldd(1) prints them.
_LIBRARY = re.compile(r"^\t(?:(\S+) => )?(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)


def tree(programs: Iterable[Path], data: Mapping[str, Path], places: Iterable[str] = ()) -> Path:
    """A directory of the cache, with `programs` where they are on the host.

    `data` are other files, by their names within; `places` are empty files, or directories if a
    slash ends them, to be mounted on.
    HostError: one of them is not there, or the cache is where no program can be run.
    """
    programs, places = sorted({Path(DYING_WITH_PARENT[0]), *programs}), sorted({NULL, *places})
    copied = {**{str(path)[1:]: path for path in programs}, **data}
    inputs = {
        "files": {name: _stamp(path) for name, path in copied.items()},
        "libraries": _stamp(_LINKER_CACHE),
        "places": places,
    }

    def build(built: Path) -> None:
        directory = built / _ROOT
        for program in programs:
            for name, found in _libraries(program):
                _copy(Path(found), directory / (f"{LIBRARIES[1:]}/{name}" if name else found[1:]))
        for name, path in copied.items():
            _copy(path, directory / name)
        for place in places:
            path = directory / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if place.endswith("/") else path.touch()

    root = build_once("cell", inputs, build) / _ROOT
    require_exec(root)
    return root


def _libraries(program: Path) -> list[tuple[str, str]]:
    """By name and path; the linker has no name. None of what is linked statically."""
    try:
        return _LIBRARY.findall(run(["ldd", program]).decode())
    except HostError as error:
        if "not a dynamic executable" in str(error):
            return []
        raise


def _stamp(path: Path) -> list[str | int]:
    """What changes with the file."""
    try:
        info = path.stat()
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}; `ratoon setup` says what is needed") from None
    return [str(path), info.st_size, info.st_mtime_ns]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o555)
