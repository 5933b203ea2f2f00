"""The machine that figures were measured on, in words."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from ratoon.machine.vmm.qemu import qemu_version
from ratoon.version import __version__


def describe_machine() -> dict[str, str]:
    """Processor, memory, kernel, and the versions of what was measured."""
    cpu = next(
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": f"{os.cpu_count()} x {cpu}",
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu_version(),
        "ratoon": __version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """The checkout's commit, with `+` if there are changes; empty outside a checkout."""
    directory = Path(__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip()
