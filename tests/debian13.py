"""A Debian 13 with nothing in it but Python, beside this host's own user space.

Its processes have the host's kernel, devices and network, and files and process ids of their own.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import children
from ratoon.artifacts import build_once, run

CHECKOUT = Path(__file__).parents[1]
#: As much as `pip install` takes.
PYTHON = ("ca-certificates", "python3", "python3-venv")
#: Process 1: waits for orphans until somebody ends it.
INIT = "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True)\n" + (
    "while True: signal.pause()"
)
#: With the directories of an overlay as $1, its lowest as $2, and what is shown as the others.
ENTER = f"""
set -eu
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount --bind "$1/tmp" tmp
mount --rbind /dev dev
mount --rbind /sys sys
mount -t proc proc proc
cat /etc/resolv.conf >etc/resolv.conf
shift 2
for place; do mkdir -p "./$place" && mount --bind "$place" "./$place"; done
pivot_root . mnt
umount -l /mnt
exec python3 -c '{INIT}' </dev/null
"""


@dataclass(frozen=True)
class Space:
    """One that runs."""

    init: int

    def run(self, *words: str | Path, uid: int = 0, **variables: str) -> str:
        """What a program prints, as a user whose id it is; it must succeed."""
        done = self.try_to_run(*words, uid=uid, **variables)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def try_to_run(
        self, *words: str | Path, uid: int = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """As `run`, whether it succeeds or not."""
        command = self.command(*words, uid=uid, **variables)
        return subprocess.run(command, check=False, capture_output=True, text=True)

    def command(self, *words: str | Path, uid: int = 0, **variables: str) -> list[str | Path]:
        """What runs that there, in its root directory and with these variables alone."""
        paths = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        clean = {"PATH": paths, "LANG": "C.UTF-8", "HOME": "/root", **variables}
        enter = ["nsenter", f"--target={self.init}", "--mount", "--pid", f"--setuid={uid}"]
        assigned = [f"{name}={value}" for name, value in clean.items()]
        return [*enter, f"--setgid={uid}", "--wdns=/", "env", "-i", *assigned, *words]

    def add_user(self, name: str, uid: int, lent: int) -> None:
        """Who has a home, and as many subordinate ids after his own."""
        self.run("groupadd", f"--gid={uid}", name)
        self.run("useradd", "--create-home", f"--uid={uid}", f"--gid={uid}", name)
        line = f"{name}:{uid + 1}:{lent}" if lent else ""
        self.run("sh", "-c", 'echo "$1" >/etc/subuid; echo "$1" >/etc/subgid', "sh", line)


def root(command: str = "") -> Path:
    """The tree of an empty one, in which root has then run a command."""

    def build(directory: Path) -> None:
        hook = [f"--customize-hook=chroot $1 sh -c {shlex.quote(command)}"] if command else []
        include = f"--include={','.join(PYTHON)}"
        run(["mmdebstrap", "--variant=minbase", include, *hook, "trixie", directory / "root"])

    return build_once("debian13", {"python": PYTHON, "command": command}, build) / "root"


@contextmanager
def space(tree: Path, *shown: Path) -> Iterator[Space]:
    """One in which all that runs is ended afterwards, and all that is written is gone.

    But for what is written to the directories of this host that are shown there.
    """
    with tempfile.TemporaryDirectory(prefix="rt-") as name:
        scratch = Path(name)
        for part in ("upper", "work", "root", "tmp"):
            (scratch / part).mkdir(mode=0o755)
        (scratch / "tmp").chmod(0o1777)
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]
        with subprocess.Popen([*unshare, scratch, tree, *shown], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline(), "it has not begun"
                (init,) = children(process.pid)
                yield Space(init)
            finally:
                process.kill()


def wheels(*extras: str) -> Path:
    """Those of what Ratoon depends on, with some of its extras, for Debian 13's Python."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(each for extra in extras for each in optional[extra])]

    def build(directory: Path) -> None:
        python = ["--python-version=3.13", "--only-binary=:all:"]
        pip("download", *python, "--dest", directory, *wanted)

    return build_once("wheels", {"python": "3.13", "packages": wanted}, build)


def install(space: Space, home: Path, *extras: str) -> None:
    """Have `home`, which is shown there as the cache's wheels are, hold a venv with this Ratoon."""
    pip("wheel", "--no-deps", "--wheel-dir", home, CHECKOUT)
    (wheel,) = home.glob("*.whl")
    space.run("python3", "-m", "venv", home / "venv")
    offline = ["--quiet", "--no-index", f"--find-links={wheels(*extras)}"]
    named = f"ratoon[{','.join(extras)}] @ {wheel.as_uri()}"
    space.run(home / "venv/bin/pip", "install", *offline, named)


def pip(*words: str | Path) -> None:
    run([sys.executable, "-m", "pip", "--quiet", *words])
