"""Renew the lock files of the guest's packages and the tests': the newest ones of Debian 12.

    .venv/bin/python scripts/update_guest.py

The archives' signatures are checked with this host's `gpgv` against Debian's keys, which are of its
package debian-archive-keyring. What is older than what is locked already is refused: somebody may
play back an old state of an archive that is signed as well as the newest.
"""

from __future__ import annotations

import lzma
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.request import urlopen

from ratoon.artifacts import run
from ratoon.machine.guest import mirrors, packages
from ratoon.machine.guest.build import PYTHON_PACKAGES
from ratoon.machine.guest.modules import DEPMOD_PACKAGES
from ratoon.machine.guest.packages import Lock, Package

KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
#: The meta-package that needs the newest kernel.
KERNEL = "linux-image-cloud-amd64"
FOR_TESTS = ("bash", "libtinfo6", "libc6", "musl", "docker-registry")
TESTS_LOCK = Path(__file__).parents[1] / "tests/packages.json"
#: By archive, suites and the component in them.
SUITES = (
    ("debian", "bookworm", "main"),
    ("debian", "bookworm-updates", "main"),
    ("debian-security", "bookworm-security", "main"),
)
#: After a day, the archive of all packages surely has what its mirrors have.
LATER = timedelta(days=1)
#: A state of an archive that says no end of its own, and of a suite that changes but at releases.
OLDEST = timedelta(days=365)

Fields = Mapping[str, str]


@dataclass(frozen=True)
class Release:
    """What an archive says of one of its suites, signed."""

    address: str
    suite: str
    text: str

    def field(self, name: str) -> str:
        found = re.search(rf"(?m)^{name}: (.*)$", self.text)
        return found[1] if found else ""

    def digest_of(self, path: str) -> tuple[str, int]:
        """SHA-256 and size in bytes."""
        checksums = self.text.split("\nSHA256:\n", 1)[1]
        found = re.search(rf"(?m)^ ([0-9a-f]{{64}}) +(\d+) {re.escape(path)}$", checksums)
        if found is None:
            sys.exit(f"{self.suite} has no {path}")
        return found[1], int(found[2])


def main() -> None:
    now = datetime.now(UTC)
    offered: dict[str, tuple[str, Fields]] = {}
    for archive, suite, component in SUITES:
        release = read_release(archive, suite, now)
        for fields in read_packages(release, component):
            name = fields["Package"]
            if name not in offered or is_newer(fields["Version"], offered[name][1]["Version"]):
                offered[name] = archive, fields
    (kernel,) = re.findall(r"linux-image-[^ ,]+", offered[KERNEL][1]["Depends"])
    date = (now + LATER).strftime("%Y%m%dT000000Z")
    for path, names in (
        (packages.LOCK, (kernel, *PYTHON_PACKAGES, *DEPMOD_PACKAGES)),
        (TESTS_LOCK, FOR_TESTS),
    ):
        renew(path, Lock(date=date, packages=[package_of(*offered[name]) for name in names]))


def read_release(archive: str, suite: str, now: datetime) -> Release:
    """One that is signed, is of this suite, and holds now."""
    address = mirrors.mirrors(archive, "")[0]
    with urlopen(f"{address}/dists/{suite}/InRelease") as answer:
        signed = answer.read()
    with tempfile.NamedTemporaryFile() as file:
        file.write(signed)
        file.flush()
        text = run(["gpgv", "--quiet", "--keyring", KEYS, "--output", "-", file.name]).decode()
    release = Release(address, suite, text)
    if release.field("Codename") != suite:
        sys.exit(f"{address} has {release.field('Codename')} for {suite}")
    date = parsedate_to_datetime(release.field("Date"))
    until = release.field("Valid-Until")
    end = parsedate_to_datetime(until) if until else date + OLDEST
    if not date <= now + timedelta(hours=1) or not now <= end:
        sys.exit(f"{suite} of {address} is of {date}, and valid until {end}: not now")
    print(f"{suite} of {address}: {date}", file=sys.stderr)
    return release


def read_packages(release: Release, component: str) -> Iterator[Fields]:
    path = f"{component}/binary-amd64/Packages.xz"
    known = [path, f"updates/{path}"]  # security's components have such names in its Release
    path = next(each for each in known if f" {each}\n" in release.text)
    sha256, size = release.digest_of(path)
    place = f"{path.removeprefix('updates/').rpartition('/')[0]}/by-hash/SHA256/{sha256}"
    packed = mirrors.fetch(
        f"dists/{release.suite}/{place}",
        sha256=sha256,
        size=size,
        addresses=[release.address],
        progress=lambda text: print(text, file=sys.stderr),
    )
    for stanza in lzma.decompress(packed).decode().split("\n\n"):
        if fields := dict(re.findall(r"(?m)^([\w-]+): (.*)$", stanza)):
            yield fields


def is_newer(one: str, other: str) -> bool:
    compared = ["dpkg", "--compare-versions", one, "gt", other]
    return subprocess.run(compared, check=False).returncode == 0


def package_of(archive: str, fields: Fields) -> Package:
    return Package.model_validate(
        {
            "name": fields["Package"],
            "version": fields["Version"],
            "archive": archive,
            "path": fields["Filename"],
            "size": int(fields["Size"]),
            "sha256": fields["SHA256"],
        }
    )


def renew(path: Path, lock: Lock) -> None:
    """Write it if any package is another one; say which."""
    old = {package.name: package for package in Lock.load(path).packages} if path.exists() else {}
    for package in lock.packages:
        if (known := old.get(package.name)) and is_newer(known.version, package.version):
            sys.exit(f"{package.name} {known.version} is locked, and {package.version} is older")
    if [*old.values()] == lock.packages:
        print(f"{path.name}: nothing is newer")
        return
    for package in lock.packages:
        if package != old.get(package.name):
            print(f"{path.name}: {package.name} {package.version}")
    path.write_text(lock.model_dump_json(indent=2) + "\n")


if __name__ == "__main__":
    main()
