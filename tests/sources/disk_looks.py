"""Looking into the root disks of images, without a machine."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ratoon.engine.sources.resolve import resolve, root_disk
from ratoon.units import MIB

DISK = 64 * MIB

#: Makes the root disk of an image, and mounts it until the test is over: its root.
Look = Callable[[str], Path]


def loop_devices_of(place: Path) -> list[str]:
    """Those of files below a directory."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if path.read_text().startswith(f"{place}/"):
                found.append(str(path))
        except OSError:  # it goes at this moment
            continue
    return found


@contextmanager
def disk_of(reference: str, place: Path) -> Iterator[Path]:
    """The disk of an image as a raw file in the directory `place`, after a check of it."""
    image = resolve(reference)
    disk = root_disk(image, DISK)
    raw = place / f"{image.digest.partition(':')[2][:12]}.raw"
    convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw"]
    subprocess.run([*convert, disk, raw], check=True)
    subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True)
    try:
        yield raw
    finally:
        raw.unlink()


@contextmanager
def mounted(reference: str, place: Path) -> Iterator[Path]:
    """The root of a disk, mounted in the directory `place`."""
    with disk_of(reference, place) as raw:
        root = raw.with_suffix(".root")
        root.mkdir()
        options = "loop,ro,nodev,nosuid,noexec"
        subprocess.run(["mount", "-t", "ext4", "-o", options, raw, root], check=True)
        try:
            yield root
        finally:
            subprocess.run(["umount", root], check=True)
