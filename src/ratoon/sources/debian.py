"""The default root image `debian`: built here by mmdebstrap, as ext4 in qcow2."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ratoon.artifacts import Progress, build_once, run, silent

SUITE = "bookworm"
PACKAGES = ("python3", "iproute2", "ca-certificates")
#: Nothing is left for the guest's kernel to initialise later: every fork would do it again.
FILE_SYSTEM = ("-t", "ext4", "-L", "ratoon", "-E", "lazy_itable_init=0,lazy_journal_init=0")
#: QEMU's user network answers DNS here.
RESOLVER = "nameserver 10.0.2.3\n"
TEXTS = {"etc/hostname": "ratoon\n", "etc/resolv.conf": RESOLVER, "etc/machine-id": ""}


def build_debian(disk_bytes: int, progress: Progress = silent) -> Path:
    """The qcow2 file of a Debian root file system of `disk_bytes`; from the cache, or built now."""
    inputs = {
        "format": 1,
        "suite": SUITE,
        "packages": PACKAGES,
        "disk_bytes": disk_bytes,
        "file_system": FILE_SYSTEM,
        "texts": TEXTS,
    }

    def build(directory: Path) -> None:
        root, raw = directory / "root", directory / "disk.raw"
        progress(f"building the root image debian:{SUITE} with mmdebstrap (half a minute)")
        include = ",".join(PACKAGES)
        run(["mmdebstrap", "--variant=minbase", f"--include={include}", SUITE, root])
        for name, text in TEXTS.items():
            (root / name).unlink(missing_ok=True)  # mmdebstrap copies some from the host
            (root / name).write_text(text)
        for name in ("proc", "sys", "dev", "run", "tmp"):
            (root / name).mkdir(exist_ok=True)
        raw.touch()
        os.truncate(raw, disk_bytes)
        run(["mke2fs", "-q", "-F", *FILE_SYSTEM, "-d", root, raw])
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, directory / "disk.qcow2"])
        raw.unlink()
        shutil.rmtree(root)

    return build_once("root-images", inputs, build, progress) / "disk.qcow2"
