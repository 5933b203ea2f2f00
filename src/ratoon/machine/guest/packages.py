"""Debian packages as raw material: chosen beforehand, fetched, unpacked, never installed.

Which ones, a lock file says, with their digests. `scripts/update_guest.py` renews it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ratoon import files
from ratoon.artifacts import Progress, build_once, silent
from ratoon.documents import Document
from ratoon.errors import HostError
from ratoon.machine.guest import debs
from ratoon.machine.guest.mirrors import fetch, mirrors
from ratoon.units import format_mib

#: What to do where no mirror has a file.
WAYS_OUT = (
    "Mirrors drop a version some time after the next one: a newer Ratoon, or in a checkout "
    "scripts/update_guest.py, names that. From a host that has network, or the files, take them by "
    "`ratoon setup --download-only DIR` there and `ratoon setup --from DIR` here"
)
#: What every guest is built of.
LOCK = Path(__file__).with_name("packages.json")


class Package(Document):
    """One exact package file. `path`: where mirrors have it, in `archive`; `size` is in bytes."""

    name: str
    version: str
    archive: Literal["debian", "debian-security"]
    path: str
    size: int
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def file(self) -> str:
        """Its name; that of the version is written in another way where it is a file's."""
        return self.path.rpartition("/")[2]


class Lock(Document):
    """`date`: of a state of `snapshot.debian.org` that has all of these, as it writes it."""

    date: str
    packages: list[Package]

    def named(self, names: Iterable[str]) -> Lock:
        """Those with these names, in this order. KeyError."""
        packages = {package.name: package for package in self.packages}
        return self.model_copy(update={"packages": [packages[name] for name in names]})


def locked() -> Lock:
    """What every guest is built of."""
    return Lock.load(LOCK)


def unpacked(lock: Lock, progress: Progress = silent, directory: Path | None = None) -> Path:
    """A directory with the files of these packages, cached by their digests. HostError.

    `directory`: where the packages are; no mirror is asked then (`ratoon setup --from`).
    """

    def build(target: Path) -> None:
        for _, content in _contents(lock, progress, directory):
            debs.unpack(content, target / "tree")

    inputs = {"format": 2, "packages": [package.model_dump() for package in lock.packages]}
    return build_once("packages", inputs, build, progress) / "tree"


def download(lock: Lock, directory: Path, progress: Progress = silent) -> None:
    """Have these packages in `directory`, each whole or not at all, for `unpacked`. HostError.

    What is there already is not fetched again.
    """
    directory.mkdir(parents=True, exist_ok=True)
    left = [package for package in lock.packages if not _is_in(directory, package)]
    rest = lock.model_copy(update={"packages": left})
    for package, content in _contents(rest, progress, None):
        files.write_durable(directory / package.file, content, 0o644)


def _contents(
    lock: Lock, progress: Progress, directory: Path | None
) -> Iterator[tuple[Package, bytes]]:
    for number, package in enumerate(lock.packages, 1):
        if directory is not None:
            yield package, _read(directory, package)
            continue
        progress(
            f"fetching {package.name} {package.version}, {format_mib(package.size)} "
            f"({number} of {len(lock.packages)})"
        )
        addresses = mirrors(package.archive, lock.date)
        try:
            content = fetch(
                package.path,
                sha256=package.sha256,
                size=package.size,
                addresses=addresses,
                progress=progress,
            )
        except HostError as error:
            raise HostError(f"{error}. {WAYS_OUT}") from None
        yield package, content


def _read(directory: Path, package: Package) -> bytes:
    path = directory / package.file
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise HostError(
            f"{path} is not there; have `ratoon setup --download-only` of this version of Ratoon "
            "fill the directory"
        ) from None
    if hashlib.sha256(content).hexdigest() != package.sha256:
        raise HostError(f"{path} is not what it was: fetch it anew with --download-only")
    return content


def _is_in(directory: Path, package: Package) -> bool:
    try:
        _read(directory, package)
    except HostError:
        return False
    return True
