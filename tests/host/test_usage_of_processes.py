"""The figures of a process, from the kernel's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ratoon.machine.host.usage import usage
from ratoon.units import MIB

#: Touches 64 MiB, computes for a moment, says so, and waits.
SCRIPT = """
import sys, time
held = b"x" * (64 << 20)
while time.process_time() < 0.3: pass
print("ready", flush=True)
sys.stdin.read()
"""


def test_memory_processor_and_disk(tmp_path: Path) -> None:
    overlay = tmp_path / "disk"
    overlay.write_bytes(bytes(2 * MIB))
    os.truncate(overlay, 100 * MIB)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        found = usage(process.pid, overlay)
        assert found is not None
        assert 64 * MIB <= found.memory_bytes < 128 * MIB
        assert found.cpu_seconds >= 0.2
        assert 2 * MIB <= found.disk_bytes < 3 * MIB
        process.kill()
    assert usage(process.pid, overlay) is None


def test_a_zombie_uses_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    try:
        assert usage(process.pid, tmp_path) is None
    finally:
        process.wait()


def test_without_its_file(tmp_path: Path) -> None:
    assert usage(os.getpid(), tmp_path / "gone") is None
