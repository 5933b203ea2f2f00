"""Debian packages as raw material: resolved by apt, downloaded, unpacked, never installed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ratoon.artifacts import Progress, build_once, run, silent
from ratoon.errors import HostError
from ratoon.machine.guest.apt import ask


@dataclass(frozen=True)
class Package:
    """One exact package file, as apt resolved it."""

    name: str
    file: str
    sha256: str


def resolve(names: Sequence[str]) -> list[Package]:
    """What apt would download for `names`, in order; needs `apt-get update`d lists."""
    found = {}
    for line in ask(["apt-get", "download", "--print-uris", *names]).splitlines():
        fields = shlex.split(line)
        file = fields[1]
        checksum = fields[-1].removeprefix("SHA256:")
        name = file.partition("_")[0]
        found[name] = Package(name, file, checksum)
    missing = [name for name in names if name not in found]
    if missing:
        raise HostError(f"apt offers no package {', '.join(missing)}; try `apt-get update`")
    return [found[name] for name in names]


def dependency(name: str, pattern: str) -> str:
    """The dependency of package `name` that matches `pattern` (a meta-package's real one)."""
    output = ask(["apt-cache", "depends", "--important", name])
    match = re.search(rf"Depends: ({pattern})$", output, re.MULTILINE)
    if match is None:
        raise HostError(f"package {name} has no dependency like {pattern}; try `apt-get update`")
    return match[1]


def unpacked(packages: Sequence[Package], progress: Progress = silent) -> Path:
    """A directory with the files of `packages`, cached by their checksums."""

    def build(directory: Path) -> None:
        names = [package.name for package in packages]
        progress(f"downloading {', '.join(names)}")
        downloads = directory / "downloads"
        downloads.mkdir()
        run(["apt-get", "download", *names], cwd=downloads)
        tree = directory / "tree"
        for file in sorted(downloads.iterdir()):
            run(["dpkg-deb", "-x", file, tree])
            file.unlink()
        downloads.rmdir()

    inputs = {"format": 1, "packages": [asdict(package) for package in packages]}
    return build_once("packages", inputs, build, progress) / "tree"
