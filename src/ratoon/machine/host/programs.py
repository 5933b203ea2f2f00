"""The host's programs that Ratoon runs, and the packages that bring them."""

from __future__ import annotations

import platform
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

#: By the program: the package of Debian and Ubuntu, and that of Fedora; None: it has none, and
#: what takes it is not to be had there.
PACKAGES: dict[str, tuple[str, str | None]] = {
    "qemu-system-x86_64": ("qemu-system-x86", "qemu-system-x86-core"),
    "qemu-img": ("qemu-utils", "qemu-img"),
    **dict.fromkeys(("mke2fs", "e2fsck", "debugfs"), ("e2fsprogs", "e2fsprogs")),
    "mmdebstrap": ("mmdebstrap", None),
    "apt-get": ("apt", None),
    "dpkg-deb": ("dpkg", "dpkg"),
    "cpio": ("cpio", "cpio"),
    "skopeo": ("skopeo", "skopeo"),
    "setpriv": ("util-linux", "util-linux"),
}
#: On Debian 12 these are too old; what makes apt take newer ones.
_TOO_OLD = {"qemu-system-x86", "qemu-utils", "e2fsprogs"}
_BACKPORTS = Path(__file__).with_name("backports.sh")

Which = Callable[[str], str | None]


def missing(which: Which = shutil.which) -> list[str]:
    """The programs that are not there."""
    return [name for name in PACKAGES if which(name) is None]


def command_for(programs: list[str], release: Mapping[str, str]) -> str | None:
    """What root runs to have these; None: no package of this distribution is known.

    `release`: what os-release(5) says.
    """
    family = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    names = [PACKAGES[each] for each in programs]
    if family & {"debian", "ubuntu"}:
        wanted = sorted({debian for debian, _ in names})
        install = f"apt-get update && apt-get install -y {shlex.join(wanted)}"
        if release.get("VERSION_CODENAME") == "bookworm" and _TOO_OLD & {*wanted}:
            return f"sh {shlex.quote(str(_BACKPORTS))} add && {install}"
        return install
    if family & {"fedora", "rhel"}:
        return f"dnf install -y {shlex.join(sorted({each for _, each in names if each}))}"
    return None


def release() -> Mapping[str, str]:
    """What this host's says; nothing, if it has none."""
    try:
        return platform.freedesktop_os_release()
    except OSError:
        return {}
