"""A Debian 13 with nothing in it but Python, beside this host's own user space.

Its processes have the host's kernel, devices and network, and files and process ids of their own.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import children
from ratoon.artifacts import build_once, run

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
        paths = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        clean = {"PATH": paths, "LANG": "C.UTF-8", "HOME": "/root", **variables}
        enter = ["nsenter", f"--target={self.init}", "--mount", "--pid", f"--setuid={uid}"]
        return subprocess.run(
            [*enter, f"--setgid={uid}", "--wdns=/", "env", "-i"]
            + [f"{name}={value}" for name, value in clean.items()]
            + [*words],
            check=False,
            capture_output=True,
            text=True,
        )

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
        for part in ("upper", "work", "root"):
            (scratch / part).mkdir(mode=0o755)
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]
        with subprocess.Popen([*unshare, scratch, tree, *shown], stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline(), "it has not begun"
                (init,) = children(process.pid)
                yield Space(init)
            finally:
                process.kill()
