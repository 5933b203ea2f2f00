"""The host's programs that Ratoon runs, what they load, and the packages that bring them."""

from __future__ import annotations

import ctypes
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ratoon.store.snapshot.manifest import OLDEST_QEMU

#: By the program: the package of Debian and Ubuntu, and that of Fedora; None: it has none, and
#: what takes it is not to be had there.
PACKAGES: dict[str, tuple[str, str | None]] = {
    "qemu-system-x86_64": ("qemu-system-x86", "qemu-system-x86-core"),
    "qemu-img": ("qemu-utils", "qemu-img"),
    **dict.fromkeys(("mke2fs", "e2fsck", "debugfs"), ("e2fsprogs", "e2fsprogs")),
    "libarchive.so.13": ("libarchive13", "libarchive"),  # with it mke2fs reads tars
    "setpriv": ("util-linux", "util-linux"),
}
#: What some images are the poorer without, as `PACKAGES`: `debian`, and those of registries.
PACKAGES_OF_IMAGES: dict[str, tuple[str, str | None]] = {
    "mmdebstrap": ("mmdebstrap", None),
    "skopeo": ("skopeo", "skopeo"),
}
#: What network policies other than `none` take; without root, pasta as well.
PACKAGES_OF_NETWORKS: dict[str, tuple[str, str | None]] = {
    "ip": ("iproute2", "iproute"),
    "nft": ("nftables", "nftables"),
}
#: What an ordinary user is the poorer without, as `PACKAGES`.
PACKAGES_OF_USERS: dict[str, tuple[str, str | None]] = {
    "newuidmap": ("uidmap", "shadow-utils"),  # for ids besides his own
    "pasta": ("passt", "passt"),
}
#: How to ask a program for its version, and the oldest that will do: an older mke2fs reads no tars.
OLDEST: dict[str, tuple[str, tuple[int, ...]]] = {
    "qemu-system-x86_64": ("--version", OLDEST_QEMU),
    "mke2fs": ("-V", (1, 47, 1)),
}
#: On Debian 12 these are too old; what makes apt take newer ones.
_TOO_OLD = {"qemu-system-x86", "qemu-utils", "e2fsprogs"}
_BACKPORTS = Path(__file__).with_name("backports.sh")

Which = Callable[[str], str | None]


def find(name: str) -> str | None:
    """Where a program is, or what a library is loaded as; None: it is not there."""
    if ".so." not in name:
        return shutil.which(name)
    try:
        return ctypes.CDLL(name)._name
    except OSError:
        return None


def missing(which: Which = find, packages: Iterable[str] = PACKAGES) -> list[str]:
    """Those of `packages` that are not there."""
    return [name for name in packages if which(name) is None]


def outdated(which: Which = find) -> dict[str, str]:
    """Those that are there and too old, with what is wrong with each."""
    found = {}
    for name, (option, oldest) in OLDEST.items():
        if path := which(name):
            done = subprocess.run([path, option], capture_output=True, text=True, check=False)
            version = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
            if version and tuple(map(int, version[0].split("."))) < oldest:
                needed = ".".join(map(str, oldest))
                found[name] = f"{name} {version[0]} is too old: {needed} or later is needed"
    return found


def has_newer(release: Mapping[str, str]) -> bool:
    """Whether what is too old on this distribution is to be had there all the same."""
    return release.get("VERSION_CODENAME") == "bookworm"


def command_for(programs: Sequence[str], release: Mapping[str, str]) -> str | None:
    """What root runs to have these; None: no package of this distribution is known.

    `release`: what os-release(5) says.
    """
    family = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    known = PACKAGES | PACKAGES_OF_IMAGES | PACKAGES_OF_NETWORKS | PACKAGES_OF_USERS
    names = [known[each] for each in programs]
    if family & {"debian", "ubuntu"}:
        wanted = sorted({debian for debian, _ in names})
        # With what these recommend, a whole desktop would come.
        install = f"apt-get install -y --no-install-recommends {shlex.join(wanted)}"
        if has_newer(release) and _TOO_OLD & {*wanted}:
            return f"sh {shlex.quote(str(_BACKPORTS))} add && apt-get update && {install}"
        return f"apt-get update && {install}"
    if family & {"fedora", "rhel"} and (wanted := sorted({each for _, each in names if each})):
        return f"dnf install -y {shlex.join(wanted)}"
    return None


def release() -> Mapping[str, str]:
    """What this host's says; nothing, if it has none."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}
