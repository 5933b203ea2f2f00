"""Having a guest write random bytes to its memory, and nothing else."""

from __future__ import annotations

from ratoon.engine.sandbox.sandbox import Sandbox
from ratoon.errors import RatoonError

#: A page: what the interpreter itself needs for more would count as dirtied as well.
_CHUNK = 4 << 10
#: By default /dev/shm takes half of the RAM.
_RESIZE = """
import subprocess
subprocess.run(["mount", "-o", "remount,size=90%", "/dev/shm"], check=True)
"""


def program(mib: int, name: str = "written") -> str:
    """Python that puts so much into a file of /dev/shm, in pieces that each begin differently."""
    resize = _RESIZE if mib > 128 else ""
    return f"""{resize}
import os
block = bytearray(os.urandom({_CHUNK}))
with open("/dev/shm/{name}", "wb", buffering=0) as file:
    for number in range({mib} * {(1 << 20) // _CHUNK}):
        block[:8] = number.to_bytes(8, "big")
        file.write(block)
del block, file
"""


async def dirty(sandbox: Sandbox, mib: int, name: str = "written") -> None:
    """By the warm interpreter, which is there already: so hardly anything else is dirtied."""
    result = await sandbox.eval(program(mib, name), timeout=600)
    if result.error:
        raise RatoonError(f"sandbox {sandbox.id} did not write {mib} MiB: {result.error}")
