"""A program in a guest that writes to a volume and closes nothing, and what the host has of it."""

from __future__ import annotations

from pathlib import Path

from vm_helpers import sh

from ratoon.engine.sandbox.options import SandboxOptions, Volume
from ratoon.engine.sandbox.sandbox import Sandbox

#: Writes lines to a file that it holds open, and the count of them to one that it has mapped;
#: what it has written is noted where no volume is. Nothing is closed, nothing is synced.
WRITER = """
import mmap, os, struct, time
lines = open("/mnt/shared/lines", "a")
fd = os.open("/mnt/shared/mapped", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 4096)
mapped = mmap.mmap(fd, 4096)
noted = os.open("/dev/shm/count", os.O_RDWR | os.O_CREAT)
count = 0
while True:
    count += 1
    lines.write(f"{count}\\n")
    lines.flush()
    mapped[:8] = struct.pack("<Q", count)
    os.pwrite(noted, b"%d" % count, 0)
    time.sleep(0.05)
"""


class Host:
    """What the host has of it."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared

    def lines(self) -> int:
        """How many lines the host has; each of them is whole, and none is left out."""
        path = self._shared / "lines"
        found = path.read_text().split() if path.exists() else []
        assert found == [str(number) for number in range(1, len(found) + 1)]
        return len(found)

    def mapped(self) -> int:
        path = self._shared / "mapped"
        return int.from_bytes(path.read_bytes()[:8], "little") if path.exists() else 0

    def lost(self, written: int) -> tuple[int, int]:
        """How much of what it had written the host has not: lines, and of the mapped count."""
        return max(0, written - self.lines()), max(0, written - self.mapped())


class Writer:
    """The program in a sandbox."""

    def __init__(self, sandbox: Sandbox, shared: Path) -> None:
        self.sandbox = sandbox
        self.lost = Host(shared).lost

    @classmethod
    async def begin(cls, sandbox: Sandbox, shared: Path) -> Writer:
        await sandbox.files.write("/root/writer.py", WRITER.encode())
        await sh(sandbox, "setsid python3 /root/writer.py </dev/null >/dev/null 2>&1 &")
        await sh(sandbox, "until [ 0$(cat /dev/shm/count) -ge 10 ]; do sleep 0.05; done")
        return cls(sandbox, shared)

    async def written(self) -> int:
        return int(await sh(self.sandbox, "cat /dev/shm/count"))


def volumes(shared: Path, **options: object) -> SandboxOptions:
    volume = Volume(source=str(shared), target="/mnt/shared")
    return SandboxOptions.model_validate({"volumes": (volume,), **options})
