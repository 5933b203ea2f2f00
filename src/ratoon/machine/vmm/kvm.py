"""What the host's KVM says of itself, before any guest is tried on it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

DEVICE = Path("/dev/kvm")
MODULES = Path("/sys/module")

#: linux/kvm.h
_CHECK_EXTENSION = 0xAE03
_CAP_TSC_CONTROL = 60


def opens() -> bool:
    """Whether this process may use it at all."""
    return os.access(DEVICE, os.R_OK | os.W_OK)


def scales_tsc() -> bool:
    """Whether a guest's time stamp counter can have another rate than the host's."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return fcntl.ioctl(fd, _CHECK_EXTENSION, _CAP_TSC_CONTROL) > 0
    except OSError:
        return False
    finally:
        os.close(fd)


def state_of_modules() -> str:
    """Which of its modules are loaded, since when, and how they are set; changes as they do."""
    return "\n".join(line for path in sorted(MODULES.glob("kvm*")) for line in _state(path))


def _state(module: Path) -> Iterator[str]:
    # One that is loaded anew has another directory.
    yield f"{module.name} {module.stat().st_ino}"
    for parameter in sorted((module / "parameters").glob("*")):
        try:
            yield f"{parameter.name}={parameter.read_text().strip()}"
        except OSError:  # some can only be written to
            continue
