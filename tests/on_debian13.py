"""Runs tests on a Debian 13, from a wheel: `on_debian13.py ROOT|LENT -- ARGUMENT…`, by root.

The arguments are pytest's. `root`: as root; a number: as an ordinary user with so many subordinate
ids, see `as_ordinary_user`. The cache is this host's.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import debian13
from ratoon import paths
from ratoon.machine.host import programs

TRIXIE = {"ID": "debian", "ID_LIKE": "", "VERSION_CODENAME": "trixie"}


def main() -> int:
    who, (_, *arguments) = sys.argv[1], sys.argv[2:]
    with (
        tempfile.TemporaryDirectory(prefix="rt-") as name,
        debian13.space(debian13.root(command()), Path(name), paths.cache()) as debian,
    ):
        home = Path(name)
        home.chmod(0o755)
        debian13.install(debian, home, "dev")
        copy = home / "checkout"
        subprocess.run(["git", "clone", "--quiet", debian13.CHECKOUT, copy], check=True)
        python = home / "venv/bin/python"
        runner = ["-m", "pytest"] if who == "root" else ["tests/as_ordinary_user.py", who, "--"]
        script = 'cd "$1" && shift && exec "$@"'
        tests = debian.command("sh", "-c", script, "sh", copy, python, *runner, *arguments)
        return subprocess.run(tests, check=False).returncode


def command() -> str:
    """What root runs for Ratoon and for its tests."""
    wanted = [*programs.PACKAGES, *programs.PACKAGES_OF_IMAGES, *programs.PACKAGES_OF_USERS]
    install = programs.command_for(wanted, TRIXIE)
    setup = (debian13.CHECKOUT / "scripts/setup.sh").read_text()
    found = re.search(r'for_tests="([^"]*)"', setup)
    assert install
    assert found
    more = found[1].replace("\\\n", "").split()
    return f"{install} {shlex.join(more)}"


if __name__ == "__main__":
    sys.exit(main())
