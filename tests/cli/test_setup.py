"""`ratoon setup`: what is missing, what root is to run, and packages for hosts without network."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from debian_mirror import Mirror, lock_of, mirror
from oci_images import file
from ratoon import paths
from ratoon.cli import setup
from ratoon.errors import HostError
from ratoon.machine.host import programs
from ratoon.machine.host.programs import (
    PACKAGES,
    PACKAGES_OF_IMAGES,
    PACKAGES_OF_NETWORKS,
    PACKAGES_OF_USERS,
)

APT = "apt-get update && apt-get install -y --no-install-recommends"
#: What is run is `ratoon`, but as this user, and with this lock file.
PROGRAM = """
import os, sys
from pathlib import Path
from ratoon.machine.guest import mirrors, packages
uid, lock, *sys.argv[1:] = sys.argv[1:]
if int(uid):
    os.geteuid = lambda: int(uid)
if lock:
    packages.LOCK = Path(lock)
    mirrors.PAUSE = 0
    mirrors.TIMEOUT = 600
    packages.mirrors = lambda archive, date: [os.environ["RATOON_MIRROR"]]
from ratoon.cli import program
program()
"""


class Setup:
    """`ratoon setup` with a PATH of the test's own."""

    def __init__(self, room: Path) -> None:
        self.room = room
        self.programs = room / "programs"
        # Who is not root has another cache, if nothing is said.
        places = {"RATOON_HOME": str(room / "home"), "RATOON_CACHE": str(paths.cache())}
        self.environment = {**os.environ, **places}

    def has(self, *names: str) -> None:
        """These are in the PATH, and nothing else is but what packages bring."""
        self.programs.mkdir()
        known = PACKAGES | PACKAGES_OF_IMAGES | PACKAGES_OF_NETWORKS | PACKAGES_OF_USERS
        for name in {*known, "env", *names}:
            if found := shutil.which(name):
                (self.programs / name).symlink_to(found)
        self.environment["PATH"] = str(self.programs)

    def lacks(self, *names: str) -> None:
        for name in names:
            (self.programs / name).unlink()

    def puts(self, name: str, script: str) -> None:
        (self.programs / name).unlink(missing_ok=True)
        (self.programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.programs / name).chmod(0o755)

    def start(
        self, *arguments: str | Path, uid: int = 0, lock: Path | None = None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(uid), lock or "", "setup", *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, *arguments: str | Path, uid: int = 0, lock: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, uid=uid, lock=lock)
        out, err = process.communicate()
        return subprocess.CompletedProcess([], process.returncode, out, err)


@pytest.fixture
def run(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


# What this host lacks -----------------------------------------------------------------------------


def test_where_nothing_is_missing(run: Setup) -> None:
    done = run()
    assert (done.returncode, done.stdout) == (0, "")
    assert "missing" not in done.stderr
    assert "guests have what they boot from" in done.stderr
    assert "next: " in done.stderr
    assert "ratoon run debian -- echo hello" in done.stderr


def test_as_json(run: Setup) -> None:
    done = run("--json")
    answer = json.loads(done.stdout)
    assert (done.returncode, answer["missing"], answer["command"]) == (0, [], None)
    assert {Path(path).name for path in answer["guest"].values()} == {"vmlinuz", "initramfs.cpio"}


def test_it_says_how_to_have_what_is_missing(run: Setup) -> None:
    run.has()
    run.lacks("setpriv")
    done = run()
    assert (done.returncode, done.stdout) == (1, f"{APT} util-linux\n")
    assert done.stderr.startswith("missing: setpriv\n")
    assert "--yes" in done.stderr
    assert json.loads(run("--json").stdout) == {
        **{"missing": ["setpriv"], "command": f"{APT} util-linux", "guest": None},
    }


def test_what_only_some_images_take(run: Setup) -> None:
    """All else works, so it is said, and that is all."""
    run.has()
    run.lacks("skopeo", "mmdebstrap")
    done = run()
    assert (done.returncode, done.stdout) == (0, f"{APT} mmdebstrap skopeo\n")
    assert "missing: mmdebstrap (may be missing), skopeo (may be missing)\n" in done.stderr


def test_without_sudo(run: Setup) -> None:
    """Who is not root then reads what root is to run."""
    run.has()
    run.lacks("setpriv", "newuidmap", "pasta")
    done = run("--yes", uid=1000)
    assert done.returncode == 1
    assert f"there is no sudo here; have root run: {APT} passt uidmap util-linux\n" in done.stderr


def test_what_is_useful_alone_fails_nothing(run: Setup) -> None:
    run.has()
    run.lacks("newuidmap")
    done = run("--yes", uid=1000)
    assert done.returncode == 0
    assert "there is no sudo here" in done.stderr
    assert "next: " in done.stderr


def test_the_command_is_run_and_its_outcome_looked_at(run: Setup) -> None:
    run.has("sh", "ln")
    run.lacks("setpriv")
    run.puts("apt-get", f'[ "$1" != install ] || ln -s {shutil.which("setpriv")} {run.programs}/')
    done = run("--yes")
    assert done.returncode == 0, done.stderr
    run.lacks("setpriv")
    run.puts("apt-get", "true")
    done = run("--yes")
    assert (done.returncode, "still missing: setpriv" in done.stderr) == (1, True)
    run.puts("apt-get", "exit 100")
    done = run("--yes")
    assert (done.returncode, f"that failed: {APT} util-linux" in done.stderr) == (1, True)


@pytest.mark.parametrize("release", [{"VERSION_CODENAME": "bookworm"}, {"ID": "other"}])
def test_what_is_too_old(monkeypatch: pytest.MonkeyPatch, release: dict[str, str]) -> None:
    """mke2fs makes some images still, so that is no reason to stop; with QEMU nothing works."""
    monkeypatch.setattr(programs, "release", lambda: release)
    monkeypatch.setattr(programs, "outdated", lambda: {"mke2fs": "mke2fs 1.46 is too old"})
    newer = "VERSION_CODENAME" in release
    assert setup._lacking() == ([], ["mke2fs"] if newer else [])
    old = {"qemu-system-x86_64": "qemu-system-x86_64 7.2 is too old"}
    monkeypatch.setattr(programs, "outdated", lambda: old)
    if newer:
        assert setup._lacking() == (["qemu-system-x86_64"], [])
    else:
        with pytest.raises(HostError, match=r"7.2 is too old, and this distribution has none"):
            setup._lacking()


# For hosts without network ------------------------------------------------------------------------


@pytest.fixture
def there(run: Setup) -> Iterator[Mirror]:
    with mirror() as found:
        run.environment["RATOON_MIRROR"] = found.address
        run.environment["RATOON_CACHE"] = str(run.room / "cache")
        yield found


def test_only_downloads(run: Setup, there: Mirror) -> None:
    packages = [there.add("a", [file("a")]), there.add("b", [file("b")])]
    lock_of(*packages).save(run.room / "lock")
    done = run("--download-only", run.room / "place", "--json", lock=run.room / "lock")
    assert done.returncode == 0, done.stderr
    names = [package.file for package in packages]
    assert json.loads(done.stdout) == {"directory": str(run.room / "place"), "files": names}
    assert sorted(path.name for path in (run.room / "place").iterdir()) == names
    assert "fetching b 1" in done.stderr
    assert f"ratoon setup --from {run.room / 'place'}" in done.stderr
    assert not (run.room / "cache").exists()
    done = run("--download-only", run.room, "--yes", lock=run.room / "lock")
    assert (done.returncode, "only downloads" in done.stderr) == (2, True)


def test_an_interrupted_download(run: Setup, there: Mirror) -> None:
    """What is there is whole, and the next one has the rest."""
    packages = [there.add("a", [file("a")]), there.add("b", [file("b")])]
    lock_of(*packages).save(run.room / "lock")
    arguments = ("--download-only", run.room / "place")
    there.failures[packages[1].path] = ["stuck"]
    process = run.start(*arguments, lock=run.room / "lock")
    assert there.stuck.wait(60)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert [path.name for path in (run.room / "place").iterdir()] == [packages[0].file]
    assert run(*arguments, lock=run.room / "lock").returncode == 0
    assert there.asked == [packages[0].path, packages[1].path, packages[1].path]


def test_an_interrupted_build(run: Setup, there: Mirror) -> None:
    package = there.add("a", [file("a")])
    lock_of(package).save(run.room / "lock")
    there.failures[package.path] = ["stuck"]
    process = run.start(lock=run.room / "lock")
    assert there.stuck.wait(60)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    left = [path for path in (run.room / "cache").rglob("*") if path.suffix != ".lock"]
    assert {path.name for path in left} == {"guest", "packages"}


def test_from_a_directory_nothing_is_fetched(run: Setup, there: Mirror) -> None:
    package = there.add("a", [file("a")])
    lock_of(package).save(run.room / "lock")
    (run.room / "place").mkdir()
    done = run("--from", run.room / "place", lock=run.room / "lock")
    assert done.returncode == 1
    assert f"{package.file} is not there; have `ratoon setup --download-only`" in done.stderr
    assert there.asked == []
