"""Runs tests as an ordinary user of this host: `as_ordinary_user.py LENT -- ARGUMENT…`, by root.

The arguments are pytest's. The tests are run by root of his user namespace, as his daemon would be,
with LENT subordinate ids; with none he is alone there. Of what takes long to make his cache has
what this host's has. What cannot be so is left out: TAKES_ROOT.
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
from ratoon.syscalls import MS_BIND

_CGROUP, _LAB = "a control group for memory or processors", "a way back to the host's network"
_LOOP = "a loop device"
#: Tests that pass for root alone, and what they take.
TAKES_ROOT = {
    "vm/test_limits_on_machines.py::test_one_that_takes_too_much_memory_dies_and_says_so": _CGROUP,
    "vm/test_limits_on_machines.py::test_one_with_little_processor_time_waits_for_it": _CGROUP,
    "vm/test_client_sandboxes.py::test_options_are_told_and_changed": _CGROUP,
    "vm/test_daemon_forkd.py::test_sandboxes_from_spawn_to_kill": _CGROUP,
    "vm/test_daemon_sandboxes.py::test_options_are_kept_shown_and_changed": _CGROUP,
    "vm/test_random_lives.py": _CGROUP,
    "vm/test_isolated_lives.py": _LOOP,
    "vm/test_benches.py::test_what_libvirt_saved_comes_back": "mounts over files of /etc",
    "vm/test_network_in_guests.py": _LAB,
    "vm/test_offline.py": _LAB,
}
#: What takes long to make.
LENT_OF_CACHE = ("accelerators", "guest", "packages", "references", "root-images", "wheels")
#: Where sockets are of who is root; his are in his home.
RUNTIME = Path("/run/ratoon")
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
    RUNTIME.mkdir(exist_ok=True)
    syscalls.mount(home, str(RUNTIME), None, MS_BIND)
    become(uid)
    os.environ |= {"HOME": home, "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ |= {"HYPOTHESIS_STORAGE_DIRECTORY": home, "PYTEST_DEBUG_TEMPROOT": home}
    user_namespace.enter()
    for name in ("RATOON_HOME", "RATOON_RUNTIME"):  # each store of the tests has its own
        del os.environ[name]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    left_out = [f"--deselect=tests/{name}" for name in TAKES_ROOT]
    os.execv(sys.executable, [*pytest, *left_out, *arguments])


def lend_cache(cache: Path, home: Path, uid: int) -> None:
    """Have the user find in his cache what is in this one; what he changes there ends with him."""
    mine = home / ".cache/ratoon"
    for name in filter(lambda name: (cache / name).is_dir(), LENT_OF_CACHE):
        place, changes, work = mine / name, home / f".changes/{name}", home / f".work/{name}"
        for directory in (place, changes, work):
            directory.mkdir(parents=True)
        layers = f"lowerdir={cache / name},upperdir={changes},workdir={work}"
        # An owner is changed without a copy of the file.
        syscalls.mount("cache", str(place), "overlay", 0, f"{layers},metacopy=on")
    mine.mkdir(parents=True, exist_ok=True)
    for place in (mine.parent, mine, *mine.rglob("*")):
        os.chown(place, uid, uid, follow_symlinks=False)


if __name__ == "__main__":
    sys.exit(main())
