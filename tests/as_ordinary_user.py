"""Runs tests as an ordinary user of this host: `as_ordinary_user.py LENT -- ARGUMENT…`, by root.

The arguments are pytest's. The tests are run by root of his user namespace, as his daemon would be,
with LENT subordinate ids; with none he is alone there. His cache begins as what this host's is.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from ordinary_user import appear, become
from ratoon import paths, syscalls
from ratoon.jail import user_namespace

#: What of the cache is his own; the rest he may add to, and read.
HIS_OWN = ("accelerators", "apt", "guest", "references", "root-images")
#: How many users can be told apart by this program's number.
USERS, LENT = 4096, 65535


def main() -> int:
    lent, (_, *arguments) = int(sys.argv[1]), sys.argv[2:]
    uid = 0x70000000 - (1 + os.getpid() % USERS) * (LENT + 1)
    with tempfile.TemporaryDirectory(prefix="rt-", ignore_cleanup_errors=True) as home:
        os.chown(home, uid, uid)
        child = os.fork()
        if not child:
            run(uid, home, lent, arguments)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)


def run(uid: int, home: str, lent: int, arguments: list[str]) -> NoReturn:
    """Be the user, and pytest."""
    cache = paths.cache()
    appear(uid, home, lent)
    lend_cache(cache, Path(home), uid)
    become(uid)
    os.environ |= {"HOME": home, "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ |= {"HYPOTHESIS_STORAGE_DIRECTORY": home, "PYTEST_DEBUG_TEMPROOT": home}
    user_namespace.enter()
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    os.execv(sys.executable, [*pytest, *arguments])


def lend_cache(cache: Path, home: Path, uid: int) -> None:
    """Have the user find in his cache what is in this one; what he changes there ends with him."""
    mine = home / ".cache/ratoon"
    places = {name: home / f".{name}" for name in ("changes", "work")}
    for place in (mine, *places.values()):
        place.mkdir(parents=True)
    layers = f"lowerdir={cache},upperdir={places['changes']},workdir={places['work']}"
    # An owner is changed without a copy of the file.
    syscalls.mount("cache", str(mine), "overlay", 0, f"{layers},metacopy=on")
    owned = [each for name in HIS_OWN for each in (mine / name).rglob("*")]
    for place in (mine.parent, mine, *mine.iterdir(), *owned):
        os.chown(place, uid, uid, follow_symlinks=False)


if __name__ == "__main__":
    sys.exit(main())
